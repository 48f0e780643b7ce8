"""Tells transformers of our classes."""

import contextlib

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling.configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from .modeling.configuration_tokenflow import TokenFlowConfig
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration, NextFlowModel
from .modeling.modeling_nextflow_vq import NextFlowVQModel
from .modeling.modeling_tokenflow import TokenFlowForImageGeneration, TokenFlowModel
from .pipelines import NextFlowAnyToAnyPipeline, TextToImagePipeline
from .processing.image_processing_nextflow import NextFlowImageProcessor
from .processing.image_processing_pil_nextflow import NextFlowImageProcessorPil
from .processing.processing_nextflow import NextFlowProcessor
from .processing.processing_tokenflow import TokenFlowProcessor


def register() -> None:
    """Register configurations, models, processors and pipelines. May be called again."""
    for config in (NextFlowConfig, NextFlowVQConfig, TokenFlowConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(NextFlowConfig, NextFlowModel, exist_ok=True)
    AutoModel.register(NextFlowVQConfig, NextFlowVQModel, exist_ok=True)
    AutoModel.register(TokenFlowConfig, TokenFlowModel, exist_ok=True)
    AutoModelForMultimodalLM.register(TokenFlowConfig, TokenFlowForImageGeneration, exist_ok=True)
    for auto_class in (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM):
        auto_class.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
    for config, processor in ((NextFlowConfig, NextFlowProcessor), (TokenFlowConfig, TokenFlowProcessor)):
        AutoTokenizer.register(config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)
    # transformers before 5.23 has no AutoImageProcessor without torchvision; NextFlowProcessor needs none.
    with contextlib.suppress(ImportError):
        AutoImageProcessor.register(
            NextFlowConfig,
            image_processor_classes={"torchvision": NextFlowImageProcessor, "pil": NextFlowImageProcessorPil},
            exist_ok=True,
        )
    # A saved checkpoint carries its code, and loads with `trust_remote_code=True` where this package is not installed.
    for config in (NextFlowConfig, NextFlowVQConfig, TokenFlowConfig):
        config.register_for_auto_class()
    for model, auto_class_name in (
        (NextFlowForConditionalGeneration, "AutoModelForMultimodalLM"),
        (NextFlowModel, "AutoModel"),
        (NextFlowVQModel, "AutoModel"),
        (TokenFlowForImageGeneration, "AutoModelForMultimodalLM"),
        (TokenFlowModel, "AutoModel"),
    ):
        model.register_for_auto_class(auto_class_name)
    for processor in (NextFlowProcessor, NextFlowImageProcessor, NextFlowImageProcessorPil, TokenFlowProcessor):
        processor.register_for_auto_class()
    for task, pipeline_class in (("any-to-any", NextFlowAnyToAnyPipeline), ("text-to-image", TextToImagePipeline)):
        PIPELINE_REGISTRY.supported_tasks.pop(task, None)
        PIPELINE_REGISTRY.register_pipeline(
            task, pipeline_class=pipeline_class, pt_model=AutoModelForMultimodalLM, type="multimodal"
        )
