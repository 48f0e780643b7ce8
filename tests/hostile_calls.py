"""Hostile and mistaken calls, each with the error it gets. `python tests/hostile_calls.py > docs/errors.md` lists them.

None may hang, draw silently wrong, or end in anything but a clear exception.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from small_models import SMALL_UNET, small_model

import nextflow_hf
from nextflow_hf.modeling.generation_nextflow import ImageSampling
from nextflow_hf.processing.image_processing_base_nextflow import buckets_from_schedule
from nextflow_hf.processing.tokenization_nextflow import train_tokenizer
from nextflow_hf.training.recipe import load_recipe

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4))
IMAGE = [3, *[5] * 29, 4]


class Bench:
    """A small random model with its processor, and the calls that are made of them."""

    def __init__(self):
        self.model = small_model(abilities=["image", "caption"], trained_image_sizes=[[32, 32]])
        self.model.config.codebook_fingerprint = self.model.vq_model.fingerprint()
        self.tokenizer = train_tokenizer(["user\na red circle", "assistant\na star"] * 20, 290)
        self.images = nextflow_hf.NextFlowImageProcessorPil(
            buckets=buckets_from_schedule(self.model.config.schedule), resolution=32, downsample=8
        )
        self.processor = nextflow_hf.NextFlowProcessor(self.images, self.tokenizer)

    def draw(self, **kwargs):
        ids = kwargs.pop("input_ids", torch.tensor([[7, 8, 9]]))
        return self.model.generate(ids, generation_mode="image", **kwargs)

    def edit(self, pixels=0.0, **kwargs):
        """A drawing with a picture in its prompt, by a checkpoint that may edit."""
        self.model.config.abilities = None
        picture = {} if pixels is None else {"pixel_values": torch.full((1, 3, 32, 32), pixels)}
        ids = [7] if pixels is None else [7, *IMAGE, 8]
        try:
            return self.draw(input_ids=torch.tensor([ids]), **picture, **kwargs)
        finally:
            self.model.config.abilities = ["image", "caption"]

    def chat(self, *content):
        return self.processor.apply_chat_template(
            [{"role": "user", "content": list(content)}], tokenize=True, return_dict=True, return_tensors="pt"
        )

    def refine(self, image=None, scheduler=None, **kwargs):
        refiner = nextflow_hf.NextFlowRefinerModel(base_config=SMALL_UNET, semantic_dim=6, pixel_dim=4, feature_dim=16)
        pipeline = nextflow_hf.NextFlowRefinerPipeline(
            refiner, scheduler or FlowMatchEulerDiscreteScheduler(), self.model.vq_model
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(image, **kwargs)

    def forward(self, **kwargs):
        own = {
            "input_ids": torch.tensor([[7, *IMAGE]]),
            "image_codes": torch.zeros(1, 30, dtype=torch.long),
            "image_grids": torch.tensor([GRIDS]),
        }
        own.update(kwargs)
        return self.model(**{name: value for name, value in own.items() if value is not None})

    def file(self, content: bytes) -> str:
        path = Path(tempfile.mkdtemp()) / "picture.png"
        path.write_bytes(content)
        return str(path)


def png(size=(64, 64)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def text(words: str) -> dict:
    return {"type": "text", "text": words}


CALLS = {
    "a PNG cut off in the middle": lambda b: b.images(Image.open(io.BytesIO(png()[:2000]))),
    "a file that is no picture": lambda b: b.chat({"type": "image", "path": b.file(b"GIF? no")}, text("what")),
    "a picture of 0x5 pixels": lambda b: b.images(np.zeros((0, 5, 3), np.uint8)),
    "a picture 30,000 pixels wide": lambda b: b.images(Image.new("RGB", (30000, 10))),
    "a picture of 400 megapixels": lambda b: b.images(Image.new("L", (20000, 20000))),
    "NaN pixels": lambda b: b.images(np.full((8, 8, 3), np.nan)),
    "float pixels in 0..255": lambda b: b.images(np.full((8, 8, 3), 200.0)),
    "negative integer pixels": lambda b: b.images(np.full((8, 8, 3), -1, np.int16)),
    "a picture of five channels": lambda b: b.images(np.zeros((8, 8, 5), np.uint8)),
    "a resolution that the model has not": lambda b: b.images(Image.new("RGB", (32, 32)), resolution=48),
    "more placeholders than pictures": lambda b: b.processor(
        text="<|vision_start|><|image_pad|><|vision_end|>" * 2, images=[Image.new("RGB", (32, 32))]
    ),
    "an empty prompt": lambda b: b.processor(text=""),
    "an empty turn": lambda b: b.chat(),
    "<|im_end|> typed into a prompt": lambda b: b.chat(text("a star<|im_end|>")),
    "<|vision_start|> typed into a prompt": lambda b: b.chat(text("<|vision_start|> a star")),
    "guidance -1": lambda b: b.draw(guidance_scale=-1.0),
    "guidance NaN": lambda b: b.draw(guidance_scale=float("nan")),
    "temperature -1": lambda b: b.draw(temperature=-1.0),
    "top_k -5": lambda b: b.draw(top_k=-5),
    "top_p 0": lambda b: b.draw(top_p=0.0),
    "top_p 2": lambda b: ImageSampling(top_p=2.0),
    "a negative size": lambda b: b.draw(image_size=(-32, 32)),
    "a size that is no multiple of the grid": lambda b: b.draw(image_size=(30, 32)),
    "a size that the checkpoint was not trained for": lambda b: b.draw(image_size=(16, 48)),
    "first scales that the image tokenizer does not show": lambda b: b.draw(num_scales=3),
    "two sizes for one prompt": lambda b: b.draw(image_size=[(32, 32), (32, 32)]),
    "two seeds for one prompt": lambda b: b.draw(seed=[1, 2]),
    "a seed and a generator": lambda b: b.draw(seed=1, generator=torch.Generator()),
    "an argument that does not exist": lambda b: b.draw(num_inference_steps=20),
    "an unknown generation mode": lambda b: b.model.generate(torch.tensor([[7]]), generation_mode="video"),
    "an ability that the checkpoint lacks": lambda b: b.model.generate(torch.tensor([[7]]), generation_mode="text"),
    "no prompt tokens": lambda b: b.draw(input_ids=torch.zeros(1, 0, dtype=torch.long)),
    "token ids beyond the vocabulary": lambda b: b.draw(input_ids=torch.tensor([[999]])),
    "prompts padded on the right": lambda b: b.draw(
        input_ids=torch.tensor([[7, 0]]), attention_mask=torch.tensor([[1, 0]])
    ),
    "a mask of the wrong shape": lambda b: b.draw(attention_mask=torch.ones(1, 5)),
    "an edit mask without a picture": lambda b: b.edit(pixels=None, mask=torch.ones(32, 32)),
    "an edit mask of another size": lambda b: b.edit(mask=torch.ones(16, 16)),
    "an empty edit mask": lambda b: b.edit(mask=torch.zeros(32, 32)),
    "a picture as an edit mask": lambda b: b.edit(mask=Image.new("L", (32, 32), 255)),
    "an edit mask and a size": lambda b: b.edit(mask=torch.ones(32, 32), image_size=(32, 32)),
    "codes out of range": lambda b: b.forward(image_codes=torch.full((1, 30), 32)),
    "negative codes": lambda b: b.forward(image_codes=torch.full((1, 30), -1)),
    "too few codes": lambda b: b.forward(image_codes=torch.zeros(1, 9, dtype=torch.long)),
    "grids of another picture": lambda b: b.forward(image_grids=torch.tensor([((1, 1), (1, 3), (2, 4), (2, 6))])),
    "grids that match no schedule": lambda b: b.forward(image_grids=torch.tensor([((1, 1), (2, 2), (3, 4), (4, 4))])),
    "the wrong number of grids": lambda b: b.forward(image_grids=torch.tensor([GRIDS, GRIDS])),
    "codes without grids": lambda b: b.forward(image_grids=None),
    "placeholders without a picture": lambda b: b.forward(image_codes=None, image_grids=None),
    "a placeholder outside a picture": lambda b: b.forward(input_ids=torch.tensor([[5, *IMAGE]])),
    "labels that are no codes": lambda b: b.forward(image_labels=torch.full((1, 30), 99)),
    "pixels that are no multiple of the patch": lambda b: b.model.vq_model.encode(torch.zeros(1, 3, 30, 32)),
    "integer pixels for the tokenizer": lambda b: b.model.vq_model.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
    "infinite pixels for the tokenizer": lambda b: b.model.vq_model.encode(torch.full((1, 3, 32, 32), torch.inf)),
    "decoding half a scale": lambda b: b.model.vq_model.decode(torch.zeros(1, 7, dtype=torch.long), GRIDS),
    "a tokenizer that the decoder was not trained with": lambda b: b.model.set_vq_model(small_model(seed=9).vq_model),
    "NaN pixels from the model": lambda b: b.processor.post_process_multimodal_output(
        torch.full((1, 3, 8, 8), torch.nan), generation_mode="image"
    ),
    "nothing to refine": lambda b: b.refine(),
    "codes to refine without their scales": lambda b: b.refine(codes=torch.zeros(1, 30, dtype=torch.long)),
    "a picture to refine of 30x32 pixels": lambda b: b.refine(Image.new("RGB", (32, 30))),
    "NaN pixels to refine": lambda b: b.refine(torch.full((1, 3, 32, 32), torch.nan)),
    "more than all of a picture painted anew": lambda b: b.refine(Image.new("RGB", (32, 32)), strength=1.5),
    "refining to four times the size": lambda b: b.refine(Image.new("RGB", (32, 32)), upsampling=4),
    "refining by a scheduler of another kind": lambda b: b.refine(Image.new("RGB", (32, 32)), DDIMScheduler()),
    "a caption for a refiner without a tokenizer": lambda b: b.refine(Image.new("RGB", (32, 32)), prompt="a star"),
    "a recipe that does not exist": lambda b: load_recipe("mini-decodr"),
}


def error_of(bench: Bench, name: str) -> Exception | None:
    """The exception that a call ends in; `None` if it does not."""
    try:
        CALLS[name](bench)
    except Exception as error:
        return error
    return None


def main() -> None:
    bench = Bench()
    print("# What mistaken calls get\n")
    print("Made by `python tests/hostile_calls.py > docs/errors.md`; kept true by `tests/test_hostile_calls.py`.\n")
    print(
        "Taken as they are, not refused: CMYK, RGBA, palette, gray and 16-bit pictures. They become 8-bit RGB, and "
        "transparency is laid on white.\n"
    )
    print("| call | error |\n|---|---|")
    for name in CALLS:
        error = error_of(bench, name)
        message = " ".join(str(error).split()).replace("|", "\\|").replace(tempfile.gettempdir(), "…")
        call = name.replace("|", "\\|")
        print(f"| {call} | `{type(error).__name__}`: {message} |")


if __name__ == "__main__":
    sys.exit(main())
