"""A picture is the same however it comes: as an object, a file, a URL or base64, to either backend."""

import base64
import functools
import http.server
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_config

import nextflow_hf
from nextflow_hf.processing.image_processing_base_nextflow import buckets_from_schedule, to_rgb

SETTINGS = {"buckets": buckets_from_schedule(small_config().schedule), "resolution": 32, "downsample": 8}


@pytest.fixture(scope="module")
def image_processor():
    return nextflow_hf.NextFlowImageProcessorPil(**SETTINGS)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def turned():
    """A landscape picture whose EXIF data say that it is a portrait."""
    image = Image.fromarray(noise(16, 48, 3))
    image.getexif()[0x0112] = 6
    return image


PICTURES = {
    "rgb.png": lambda: Image.fromarray(noise(40, 40, 3)),
    "rgba.png": lambda: Image.fromarray(noise(40, 40, 4)),
    "clear.png": lambda: Image.new("RGBA", (32, 32), (0, 0, 0, 0)),
    "gray.png": lambda: Image.fromarray(noise(40, 40)),
    "deep.png": lambda: Image.fromarray(np.full((32, 32), 40000, np.uint16)),
    "palette.gif": lambda: Image.fromarray(noise(40, 40, 3)).convert("P"),
    "cmyk.tiff": lambda: Image.new("CMYK", (32, 32), (0, 255, 255, 0)),
    "turned.png": turned,
}


def save(image, path):
    image.save(path, exif=image.getexif())
    return str(path)


@pytest.mark.parametrize("name", PICTURES)
def test_a_file_is_the_picture_that_it_holds(image_processor, tmp_path, name):
    path = save(PICTURES[name](), tmp_path / name)
    with Image.open(path) as image:
        expected = image_processor(image, return_tensors="pt")
    encoded = base64.b64encode((tmp_path / name).read_bytes()).decode()
    for source in (path, tmp_path / name, encoded, f"data:image/png;base64,{encoded}"):
        out = image_processor([source], return_tensors="pt")
        assert all(torch.equal(out[key], expected[key]) for key in expected)


def test_transparency_and_depth_survive_a_file(image_processor, tmp_path):
    clear = image_processor(save(PICTURES["clear.png"](), tmp_path / "clear.png"), return_tensors="pt")
    assert (clear["pixel_values"] == 1).all()
    deep = image_processor(save(PICTURES["deep.png"](), tmp_path / "deep.png"), return_tensors="pt")
    torch.testing.assert_close(deep["pixel_values"], torch.full((1, 3, 32, 32), (40000 >> 8) / 127.5 - 1))


def test_a_picture_is_turned_upright(image_processor):
    assert image_processor(turned(), return_tensors="pt")["pixel_values"].shape[-2:] == (48, 16)


def test_a_url_is_fetched(image_processor, tmp_path):
    path = save(PICTURES["rgba.png"](), tmp_path / "rgba.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/rgba.png"
            out, expected = (image_processor(source, return_tensors="pt")["pixel_values"] for source in (url, path))
        finally:
            server.shutdown()
    assert torch.equal(out, expected)


def test_integers_and_floats_of_any_kind_are_the_same_picture(image_processor):
    gray = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(np.asarray(to_rgb(gray.convert("I"))), np.asarray(to_rgb(gray)))
    pixels = torch.from_numpy(noise(3, 32, 32) & 0xC0)
    expected = image_processor(pixels, return_tensors="pt")["pixel_values"]
    for own in (pixels.int(), pixels.float() / 255, (pixels.float() / 255).requires_grad_()):
        assert torch.equal(image_processor(own, return_tensors="pt")["pixel_values"], expected)
    rough = image_processor((pixels.float() / 255).bfloat16(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(rough, expected, atol=2 / 127.5, rtol=0)


def write(path, content):
    path.write_bytes(content)
    return str(path)


def cut_off(folder):
    path = folder / "cut.png"
    Image.fromarray(noise(64, 64, 3)).save(path)
    return write(path, path.read_bytes()[:2000])


def bomb(folder):
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    return str(folder / "bomb.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cut_off, "damaged"),
        (lambda folder: write(folder / "text.png", b"not a picture"), "cannot identify"),
        (lambda folder: write(folder / "empty.png", b""), "cannot identify"),
        (bomb, "decompression bomb"),
        (lambda folder: str(folder / "missing.png"), "no file, no URL and no base64"),
        (lambda folder: np.zeros((8, 8, 3), complex), "integers or floats"),
        (lambda folder: np.full((8, 8, 3), "a", object), "integers or floats"),
        (lambda folder: [], "No pictures"),
    ],
)
def test_refuses_sources_that_hold_no_picture(image_processor, tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        image_processor(make(tmp_path), return_tensors="pt")


@pytest.mark.parametrize("size", [(32, 32), (300, 280), (20, 25), (97, 250), (250, 97)])
def test_both_backends_give_the_same_tensors(image_processor, size):
    pytest.importorskip("torchvision")
    image = Image.fromarray(noise(*size, 3))
    expected = image_processor(image, return_tensors="pt")
    out = nextflow_hf.NextFlowImageProcessor(**SETTINGS)(image, return_tensors="pt")
    assert all(torch.equal(out[key], expected[key]) for key in expected)
