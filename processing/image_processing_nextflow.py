"""Image processor on torchvision."""

import torch
from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_base_nextflow import NextFlowImageProcessing, NextFlowImageProcessorKwargs


class NextFlowImageProcessor(NextFlowImageProcessing, TorchvisionBackend):
    """Brings pictures to the buckets of a scale schedule; equal to [`NextFlowImageProcessorPil`] within 1/255."""

    valid_kwargs = NextFlowImageProcessorKwargs

    def fetch_images(self, image_url_or_urls):
        """Load pictures by PIL, which knows more formats and says what is wrong with a file."""
        return super(TorchvisionBackend, self).fetch_images(image_url_or_urls)

    def _preprocess(self, images: list[torch.Tensor], **kwargs):
        return super()._preprocess([image.cpu() for image in images], **kwargs)


__all__ = ["NextFlowImageProcessor"]
