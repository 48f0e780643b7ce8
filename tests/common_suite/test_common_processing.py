"""transformers' own processor and image processor tests, run on our classes."""

import unittest

import numpy as np
from hf_suite.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from hf_suite.test_processing_common import ProcessorTesterMixin
from small_models import small_config

from nextflow_hf import NextFlowImageProcessorPil, NextFlowProcessor
from nextflow_hf.processing.image_processing_base_nextflow import buckets_from_schedule
from nextflow_hf.processing.tokenization_nextflow import train_tokenizer

# The suite's pictures are up to 17 times as wide as high.
IMAGE_PROCESSOR = {
    "buckets": buckets_from_schedule(small_config().schedule),
    "resolution": 32,
    "downsample": 8,
    "max_stretch": 10.0,
}


class NextFlowProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = NextFlowProcessor

    @classmethod
    def setUpClass(cls):
        # A processor that carries its code says so in its files only, which the suite takes for a difference.
        cls.auto_class, NextFlowProcessor._auto_class = NextFlowProcessor._auto_class, None
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        NextFlowProcessor._auto_class = cls.auto_class
        super().tearDownClass()

    @classmethod
    def _setup_tokenizer(cls):
        return train_tokenizer(["user\nlower newer upper older longer string", "assistant\nthis is a test"] * 50, 320)

    @classmethod
    def _setup_image_processor(cls):
        return NextFlowImageProcessorPil(**IMAGE_PROCESSOR)


class NextFlowImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent):
        self.parent = parent
        self.batch_size = 3
        self.num_channels = 3
        self.min_resolution = 20
        self.max_resolution = 40
        self.image_processing_classes = {"pil": NextFlowImageProcessorPil}

    def prepare_image_processor_dict(self):
        return IMAGE_PROCESSOR

    def expected_output_image_shape(self, images):
        """All buckets of a batch are padded to the largest."""
        processor = NextFlowImageProcessorPil(**IMAGE_PROCESSOR)
        sizes = [processor.bucket_of(*self._size(image))[-1] for image in images]
        return self.num_channels, max(h for h, _ in sizes) * 8, max(w for _, w in sizes) * 8

    @staticmethod
    def _size(image):
        if hasattr(image, "convert"):
            return image.size[::-1]
        return image.shape[:2] if isinstance(image, np.ndarray) else image.shape[-2:]


class NextFlowImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = NextFlowImageProcessingTester
