"""The refiner behind a model that draws: loaded by name, checked against the model, applied to what it drew."""

import inspect
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from PIL import Image

from . import REFINERS
from .modeling.generation_nextflow import NextFlowImageOutput
from .modeling.pipeline_refiner import NextFlowRefinerPipeline

# What a caller says of the painting itself; the rest follows from what was drawn.
SETTINGS = ("upsampling", "strength", "num_inference_steps", "sigmas", "guidance_scale", "callback_on_step_end")


def load_refiner(refiner: str | os.PathLike | NextFlowRefinerPipeline, model) -> NextFlowRefinerPipeline:
    """A refiner for what a model draws, on its device.

    Args:
        refiner: "mini" (bundled), a folder, a Hub id, or a pipeline that is loaded already.
        model: The model that draws, with its `vq_model`.

    Raises:
        ValueError: If the refiner was trained on another tokenizer's codes.
    """
    if isinstance(refiner, (str, os.PathLike)):
        refiner = _loaded(REFINERS.get(str(refiner), str(refiner)))
    own, drawn = refiner.vq_model.fingerprint(), model.vq_model.fingerprint()
    if own != drawn:
        raise ValueError(
            f"The refiner was trained on the codes of the image tokenizer {own}, but the model draws with {drawn}. "
            "Train one on this tokenizer: `nextflow-hf train mini-refiner init_from.vq=FOLDER`."
        )
    return refiner.to(model.device)


@lru_cache(maxsize=2)
def _loaded(path: str) -> NextFlowRefinerPipeline:
    refiner = NextFlowRefinerPipeline.from_pretrained(path)
    refiner.set_progress_bar_config(disable=True)
    return refiner


def check_refining(refining: dict) -> None:
    """Refuse settings of a refiner before anything is drawn.

    Raises:
        ValueError: If one is unknown, or out of its range.
    """
    unknown = set(refining) - set(SETTINGS)
    if unknown:
        raise ValueError(f"A refiner's settings are {SETTINGS}, not {sorted(unknown)}.")
    defaults = inspect.signature(NextFlowRefinerPipeline.__call__).parameters
    own = {name: refining.get(name, defaults[name].default) for name in SETTINGS}
    NextFlowRefinerPipeline.check_settings(own["upsampling"], own["strength"], own["num_inference_steps"])


def refine_drawn(
    refiner: NextFlowRefinerPipeline,
    output: NextFlowImageOutput,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    **refining,
) -> list[Image.Image]:
    """Refined pictures of what was drawn, each from its own seed.

    Args:
        refiner: The refiner, on the tokenizer that drew.
        output: What `generate` gave.
        prompts: What the pictures show, for a refiner that embeds captions itself; another is told nothing, with a
            warning.
        seeds: A seed for the noise of each; random by default.
        refining: Of `SETTINGS`.
    """
    if prompts is not None and refiner.tokenizer is None:
        warnings.warn(
            "This refiner embeds no captions itself, so it is not told the prompts; call it with `prompt_embeds` of "
            "its base's text encoders for that.",
            stacklevel=2,
        )
        prompts = None
    pictures = []
    for index, (codes, grids) in enumerate(zip(output.codes, output.grids, strict=True)):
        prompt = None if prompts is None else prompts[index]
        generator = None if seeds is None else torch.Generator().manual_seed(int(seeds[index]))
        pictures += refiner(codes=codes[None], grids=grids, prompt=prompt, generator=generator, **refining).images
    return pictures
