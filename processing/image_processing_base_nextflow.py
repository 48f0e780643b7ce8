"""What both image processors share: which pictures are taken, and how they are brought to a bucket's size."""

import base64
import os
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

# PIL's own threshold for decompression bombs.
MAX_PIXELS = 178_956_970


class NextFlowImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    buckets (`dict[str, list]`):
        Side of the square picture in pixels -> aspect-ratio buckets of that resolution, each the list of its grids
        (height, width), coarse to fine. Made by `buckets_from_schedule`.
    resolution (`int`):
        Which of the resolutions pictures are brought to.
    downsample (`int`):
        Pixels per grid cell and side.
    max_stretch (`float`):
        A picture whose aspect ratio lies further than this factor beyond the most extreme bucket is refused.
    """

    buckets: dict
    resolution: int
    downsample: int
    max_stretch: float


def buckets_from_schedule(schedule) -> dict[str, list]:
    """A scale schedule's buckets as data for [`NextFlowImageProcessor`].

    Args:
        schedule: A `ScaleSchedule`.
    """
    return {
        str(side): [
            [list(grid) for grid in schedule.grids(final_grid, num_scales)]
            for final_grid in schedule.buckets(num_scales)
        ]
        for side, num_scales in schedule.resolutions.items()
    }


class NextFlowImageProcessing:
    """Bucket by aspect ratio, resize, crop, scale to [-1, 1]; for either backend.

    A picture is resized (bicubic, antialiased) to cover its bucket and cropped at the centre. One that has a bucket's
    exact size keeps its pixels.
    """

    resample = PILImageResampling.BICUBIC
    buckets = None
    resolution = None
    downsample = 16
    max_stretch = 2.0
    do_resize = True
    do_convert_rgb = True
    # Both together take 0..255 to [-1, 1].
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    model_input_names = ["pixel_values", "image_grids"]

    def fetch_images(self, image_url_or_urls):
        """Open pictures that are given as a path, URL or base64 text; others pass.

        transformers' own loader would drop transparency and clip 16-bit pictures before they can be converted.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(own) for own in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return open_picture(os.fspath(image_url_or_urls))
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, input_data_format=None, **kwargs):
        """Check one picture and convert it to the backend's RGB array."""
        rgb = to_rgb(image, input_data_format)
        return super().process_image(rgb, **{**kwargs, "do_convert_rgb": False, "input_data_format": None})

    def _validate_preprocess_kwargs(self, **kwargs):
        """Sizes come from the buckets, not from `size`, which transformers would ask for."""

    def bucket_of(self, height: int, width: int, resolution: int | None = None) -> list[list[int]]:
        """Grids of the bucket that a picture of `height` x `width` pixels goes to.

        Raises:
            ValueError: If the resolution is unknown, or no bucket is near the picture's shape.
        """
        resolution = self.resolution if resolution is None else resolution
        if not self.buckets:
            raise ValueError("This image processor has no `buckets`; make them with `buckets_from_schedule(schedule)`.")
        if str(resolution) not in self.buckets:
            raise ValueError(f"`resolution` must be one of {sorted(map(int, self.buckets))}, got {resolution}.")
        buckets = self.buckets[str(resolution)]
        ratios = np.array([np.log(grids[-1][0] / grids[-1][1]) for grids in buckets])
        own = np.log(height / width)
        if abs(own) > np.abs(ratios).max() + np.log(self.max_stretch):
            raise ValueError(
                f"A picture of {height}x{width} pixels (height x width) is too far from every aspect ratio that this "
                f"model knows; the most extreme is {np.exp(np.abs(ratios).max()):.2f}:1. Crop it first."
            )
        return buckets[int(np.abs(ratios - own).argmin())]

    def _preprocess(
        self,
        images: list,
        do_resize: bool,
        resample,
        resolution: int | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        if not images:
            raise ValueError("No pictures were given.")
        mean, std = (np.asarray(own, dtype=np.float64).reshape(-1, 1, 1) for own in (image_mean, image_std))
        arrays, grids = [], []
        for image in images:
            height, width = image.shape[-2:]
            bucket = self.bucket_of(height, width, resolution)
            target = (bucket[-1][0] * self.downsample, bucket[-1][1] * self.downsample)
            if (height, width) != target:
                if not do_resize:
                    raise ValueError(f"A picture of {height}x{width} pixels has no bucket's size and do_resize=False.")
                image = self._cover(image, target, resample)
            pixels = np.asarray(image, dtype=np.float64)
            pixels = pixels * rescale_factor if do_rescale else pixels
            pixels = (pixels - mean) / std if do_normalize else pixels
            arrays.append(pixels.astype(np.float32))
            grids.append(np.array(bucket))
        tensors = {"pixel_values": _stack(arrays), "image_grids": _stack(grids)}
        return BatchFeature(data=tensors, tensor_type=return_tensors)

    def _cover(self, image, target: tuple[int, int], resample):
        """Resize so that the target is covered, and crop at the centre."""
        height, width = image.shape[-2:]
        scale = max(target[0] / height, target[1] / width)
        size = SizeDict(height=max(target[0], round(height * scale)), width=max(target[1], round(width * scale)))
        image = self.resize(image, size, resample=resample)
        top, left = (size.height - target[0]) // 2, (size.width - target[1]) // 2
        return image[..., top : top + target[0], left : left + target[1]]


def open_picture(source: str, background: str = "white") -> Image.Image:
    """The picture at a path or URL, or in base64 text, as 8-bit RGB; transparency is laid on `background`.

    Raises:
        ValueError: If there is none, or it is damaged or huge.
        httpx.HTTPError: If a URL cannot be fetched.
    """
    shown = source if len(source) <= 200 else f"{source[:200]}..."
    if source.startswith(("http://", "https://")):
        file = BytesIO(httpx.get(source, follow_redirects=True, timeout=60).raise_for_status().content)
    elif os.path.isfile(source):
        file = source
    else:
        try:
            file = BytesIO(base64.decodebytes(source.split(",")[-1].encode()))
        except ValueError as error:
            raise ValueError(f"There is no picture {shown!r}: it is no file, no URL and no base64 text.") from error
    try:
        image = Image.open(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The picture {shown!r} cannot be read: {error}") from error
    with image:
        return to_rgb(image, background=background)


def to_rgb(image, input_data_format: str | ChannelDimension | None = None, background: str = "white") -> Image.Image:
    """A picture in any usual form as 8-bit RGB, upright.

    Args:
        image: PIL image, or array or tensor of shape `(h, w)`, `(h, w, c)` or `(c, h, w)` with 1, 3 or 4 channels:
            8- or 16-bit unsigned integers, or floats in [0, 1].
        input_data_format: Where an array's channels are; guessed from the shape by default.
        background: What transparency is laid on.

    Raises:
        ValueError: If it is not such a picture, is empty, huge or damaged, or holds NaN.
    """
    if not isinstance(image, Image.Image):
        image = _from_array(image, input_data_format)
    if 0 in image.size:
        raise ValueError(f"A picture needs at least one pixel per side, got {image.height}x{image.width}.")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"A picture of {image.height}x{image.width} pixels is too large; {MAX_PIXELS} at most.")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        raise ValueError(f"A picture is damaged and cannot be read: {error}") from error
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"A 16-bit picture holds values in 0..65535, got {values.min()}..{values.max()}.")
        # Mode "I" does not say its depth. Like integer arrays it is 8-bit where it fits; as 16-bit it would be black.
        eight_bits = image.mode == "I" and values.max() <= 255
        image = Image.fromarray((values if eight_bits else values >> 8).astype(np.uint8))
    elif image.mode == "F":
        image = _from_array(np.asarray(image), None)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _from_array(image, input_data_format: str | ChannelDimension | None) -> Image.Image:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        # numpy has no bfloat16
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"A picture is a PIL image, an array or a tensor, got {type(image).__name__}.")
    if image.ndim == 3:
        channels_first = (
            input_data_format == ChannelDimension.FIRST
            if input_data_format is not None
            else image.shape[0] in (1, 3, 4)  # where both ends could be channels, the first are, as in transformers
        )
        image = np.moveaxis(image, 0, -1) if channels_first else image
        image = image[..., 0] if image.shape[2] == 1 else image
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise ValueError(
            f"A picture has shape (h, w), (h, w, c) or (c, h, w) with 1, 3 or 4 channels, got {image.shape}."
        )
    if 0 in image.shape:
        raise ValueError(f"A picture needs at least one pixel per side, got {image.shape[0]}x{image.shape[1]}.")
    if image.dtype.kind not in "fiub":
        raise ValueError(f"Pixels must be integers or floats, got {image.dtype}.")
    if image.dtype.kind == "f":
        if not np.isfinite(image).all():
            raise ValueError("A picture holds NaN or infinite pixels.")
        if image.min() < 0 or image.max() > 1:
            raise ValueError(f"Float pixels must lie in [0, 1], got {image.min():.3g}..{image.max():.3g}.")
        image = np.rint(image * 255)
    elif image.dtype == np.uint16:
        image = image >> 8
    elif image.dtype != np.uint8 and (image.dtype == bool or image.min() < 0 or image.max() > 255):
        raise ValueError(f"Integer pixels must lie in 0..255, got {image.dtype} {image.min()}..{image.max()}.")
    return Image.fromarray(np.ascontiguousarray(image.astype(np.uint8)))


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Stack arrays, padded with zeros at the end of each axis to the largest."""
    shape = np.max([array.shape for array in arrays], axis=0)
    stacked = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for target, array in zip(stacked, arrays):
        target[tuple(slice(side) for side in array.shape)] = array
    return stacked
