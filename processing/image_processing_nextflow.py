"""Image processor on torchvision."""

import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend

from .image_processing_base_nextflow import NextFlowImageProcessing, NextFlowImageProcessorKwargs


class NextFlowImageProcessor(NextFlowImageProcessing, TorchvisionBackend):
    """Brings pictures to the buckets of a scale schedule; equal to [`NextFlowImageProcessorPil`] to the bit."""

    valid_kwargs = NextFlowImageProcessorKwargs
    # torchvision's bicubic differs from PIL's by tens of grey levels at sharp edges; one checkpoint, one resampling.
    resize = PilBackend.resize

    def _preprocess(self, images: list[torch.Tensor], **kwargs):
        return super()._preprocess([image.cpu().numpy() for image in images], **kwargs)


__all__ = ["NextFlowImageProcessor"]
