"""The refiner behind a model that draws: loaded by name, checked against the model, applied to what it drew."""

from collections.abc import Sequence

import torch
from PIL import Image

from . import REFINERS
from .modeling.generation_nextflow import NextFlowImageOutput
from .modeling.modeling_nextflow_vq import NextFlowVQModel
from .modeling.pipeline_refiner import NextFlowRefinerPipeline


def load_refiner(refiner: str | NextFlowRefinerPipeline, vq_model: NextFlowVQModel) -> NextFlowRefinerPipeline:
    """A refiner for what is drawn with a tokenizer.

    Args:
        refiner: "mini" (bundled), a folder, a Hub id, or a pipeline that is loaded already.
        vq_model: The tokenizer.

    Raises:
        ValueError: If the refiner was trained on another tokenizer's codes.
    """
    if isinstance(refiner, str):
        refiner = NextFlowRefinerPipeline.from_pretrained(REFINERS.get(refiner, refiner))
        refiner.set_progress_bar_config(disable=True)
    own, drawn = refiner.vq_model.fingerprint(), vq_model.fingerprint()
    if own != drawn:
        raise ValueError(
            f"The refiner was trained on the codes of the image tokenizer {own}, but the model draws with {drawn}. "
            "Train one on this tokenizer: `nextflow-hf train mini-refiner init_from.vq=FOLDER`."
        )
    return refiner


def refine_drawn(
    refiner: NextFlowRefinerPipeline,
    output: NextFlowImageOutput,
    prompts: Sequence[str | None] | None = None,
    seeds: Sequence[int] | None = None,
    **refining,
) -> list[Image.Image]:
    """Refined pictures of what was drawn, each from its own seed.

    Args:
        refiner: The refiner, on the tokenizer that drew.
        output: What `generate` gave.
        prompts: What the pictures show, for the refiner's text side; nothing by default.
        seeds: A seed for the noise of each; random by default.
        refining: Goes to the refiner, such as `strength`, `num_inference_steps` and `upsampling`.
    """
    pictures = []
    for index, (codes, grids) in enumerate(zip(output.codes, output.grids, strict=True)):
        prompt = None if prompts is None or refiner.tokenizer is None else prompts[index]
        generator = None if seeds is None else torch.Generator().manual_seed(int(seeds[index]))
        pictures += refiner(codes=codes[None], grids=grids, prompt=prompt, generator=generator, **refining).images
    return pictures
