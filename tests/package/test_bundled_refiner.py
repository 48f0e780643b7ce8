"""The refiner in the box: it loads, follows the checkpoint, and gains what it is there for."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from transformers import pipeline

import nextflow_hf
from nextflow_hf import REFINERS, NextFlowRefinerPipeline
from nextflow_hf.abilities import shows
from nextflow_hf.scenes import Referee, SceneSource
from nextflow_hf.training.data import to_pixels

NUMBER = 8


def decibels(pictures: torch.Tensor, true: torch.Tensor) -> float:
    return (-10 * (pictures - true).square().mean(dim=(1, 2, 3)).log10()).mean().item()


def test_it_beats_the_decoder_and_bicubic_on_scenes_it_never_saw():
    refiner = DiffusionPipeline.from_pretrained(REFINERS["mini"])
    assert isinstance(refiner, NextFlowRefinerPipeline)
    refiner.set_progress_bar_config(disable=True)
    source = SceneSource((128, 128), NUMBER, 91, "test", "free")
    large = torch.from_numpy(to_pixels(np.stack([source.image(index) for index in range(NUMBER)])))
    encoding = refiner.vq_model.encode(F.avg_pool2d(large, 2))
    decoded = (refiner.vq_model.decode(encoding.codes, encoding.grids) + 1) / 2
    true = (large + 1) / 2

    def refine(upsampling):
        return refiner(
            codes=encoding.codes,
            grids=encoding.grids,
            upsampling=upsampling,
            strength=1.0,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    bicubic = F.interpolate(decoded, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
    doubled = refine(2)
    assert decibels(doubled, true) > decibels(bicubic, true) + 2
    assert decibels(refine(1), F.avg_pool2d(true, 2)) > decibels(decoded, F.avg_pool2d(true, 2)) + 1
    referee = Referee(source.scene(0).lattice)
    read = [
        [shows(referee.look((own.permute(1, 2, 0) * 255).round().byte().numpy()), source.scene(index)) for own in row]
        for index, row in enumerate(zip(doubled, bicubic))
    ]
    assert np.mean(read, axis=0)[0] >= np.mean(read, axis=0)[1]


def test_it_follows_the_checkpoint():
    draw = pipeline("text-to-image", model=nextflow_hf.MINI)
    plain = draw("two green crosses", seed=7)
    settings = {"upsampling": 2, "strength": 1.0, "num_inference_steps": 2}
    large = (draw | "mini")("two green crosses", seed=7, refining=settings)
    assert large.size == (2 * plain.width, 2 * plain.height)
    referee = Referee()
    small, big = (referee.look(np.asarray(own)) for own in (plain, large))
    assert {(own.shape, own.color) for own in small.objects} == {(own.shape, own.color) for own in big.objects}
