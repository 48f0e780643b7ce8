"""Image processor on PIL, which needs no torchvision."""

from transformers.image_processing_backends import PilBackend

from .image_processing_base_nextflow import NextFlowImageProcessing, NextFlowImageProcessorKwargs


class NextFlowImageProcessorPil(NextFlowImageProcessing, PilBackend):
    """Brings pictures to the buckets of a scale schedule."""

    valid_kwargs = NextFlowImageProcessorKwargs


__all__ = ["NextFlowImageProcessorPil"]
