"""transformers' own configuration and model tests, run on our classes."""

import unittest

import torch
from hf_suite import test_modeling_common
from hf_suite.generation.test_utils import GenerationTesterMixin
from hf_suite.test_configuration_common import ConfigTester
from hf_suite.test_modeling_common import ModelTesterMixin, floats_tensor
from hf_suite.test_pipeline_mixin import PipelineTesterMixin
from small_models import small_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from nextflow_hf import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowModel,
    NextFlowVQConfig,
    NextFlowVQModel,
)

# The suite knows base models and models with labels by these tables.
MODEL_MAPPING_NAMES.update({"nextflow": "NextFlowModel", "nextflow_vq": "NextFlowVQModel"})
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["nextflow"] = "NextFlowForConditionalGeneration"

GRIDS = ((1, 1), (2, 2))

_ids_tensor = test_modeling_common.ids_tensor


def ids_of_text(*args, **kwargs):
    """Random ids without special tokens: an image token without its picture is an error."""
    return _ids_tensor(*args, **kwargs).clamp(min=6)


test_modeling_common.ids_tensor = ids_of_text


class NextFlowModelTester:
    """Sequences of text, a picture of two scales, and text."""

    def __init__(self, parent):
        self.parent = parent
        # Some tests make up rows of random ids where there are fewer than seven.
        self.batch_size = 7
        config = small_config()
        self.seq_length = 6 + len(GRIDS) + 4
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads
        self.vocab_size = config.text_config.vocab_size
        self.is_training = True

    def get_config(self):
        return small_config()

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        image = [config.boi_token_id, *[config.image_token_id] * 4, config.eoi_token_id]
        words = ids_of_text([self.batch_size, 6], 64).tolist()
        input_ids = torch.tensor([[*row[:2], *image, *row[2:]] for row in words])
        assert input_ids.shape == (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": floats_tensor([self.batch_size, 3, 16, 16]).clamp(-1, 1),
            "image_grids": torch.tensor([GRIDS] * self.batch_size),
        }
        return config, inputs


class NextFlowModelTest(ModelTesterMixin, GenerationTesterMixin, PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (NextFlowModel, NextFlowForConditionalGeneration)
    pipeline_model_mapping = {
        "feature-extraction": NextFlowModel,
        "image-text-to-text": NextFlowForConditionalGeneration,
        "any-to-any": NextFlowForConditionalGeneration,
    }
    # Codes are indices: no gradient passes from the decoder to the tokenizer.
    test_all_params_have_gradient = False
    test_resize_embeddings = True
    _is_composite = True

    def setUp(self):
        self.model_tester = NextFlowModelTester(self)
        self.config_tester = ConfigTester(
            self, config_class=NextFlowConfig, has_text_modality=False, common_properties=["text_config", "vq_config"]
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Some tests take the text alone: its pictures go with it."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if inputs.get("input_ids") is not None:
            pictures = int((inputs["input_ids"] == small_config().boi_token_id).sum())
            _, own = self.model_tester.prepare_config_and_inputs_for_common()
            for name in ("pixel_values", "image_grids"):
                if name not in inputs and pictures:
                    inputs[name] = own[name][:pictures]
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()


class NextFlowVQModelTester:
    def __init__(self, parent):
        self.parent = parent
        self.batch_size = 2
        self.is_training = True
        self.num_hidden_layers = 2

    def get_config(self):
        return small_config().vq_config

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": floats_tensor([self.batch_size, 3, 16, 16]).clamp(-1, 1)}


class NextFlowVQModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (NextFlowVQModel,)
    test_resize_embeddings = False
    has_attentions = False
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = NextFlowVQModelTester(self)
        self.config_tester = ConfigTester(
            self, config_class=NextFlowVQConfig, has_text_modality=False, common_properties=["codebook_size"]
        )

    def test_config(self):
        self.config_tester.run_common_tests()
