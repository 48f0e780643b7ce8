"""What a refiner gains over the tokenizer's decoder, and what it costs: held-out scenes, codes in, pictures out.

At equal output size, for strengths and numbers of steps: PSNR; feature distance (mean squared difference of the
semantic encoder's features, of the tokenizer that the refiner has); edge sharpness (mean gradient over the true edges,
as a share of the true picture's); and how many pictures the referee reads as the scene is. Doubled: PSNR within two
pixels of the edges of shapes, against bicubic upsampling of what the decoder paints.

    python benchmarks/refiner.py

writes `benchmarks/results/refiner.json`, and the tables and figures of `docs/refiner.md`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, record, save_figure, seconds, table, write_json

from nextflow_hf import REFINERS, NextFlowRefinerPipeline
from nextflow_hf.abilities import shows
from nextflow_hf.scenes import Referee, SceneSource, lattice_for
from nextflow_hf.training.data import to_pixels

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "refiner.md"
BEGIN, END = "<!-- refiner: begin -->", "<!-- refiner: end -->"
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
STEPS = (1, 2, 4, 8)


def edges(true: torch.Tensor) -> torch.Tensor:
    """Where the true pictures `(n, 3, h, w)` change, and two pixels around: bool `(n, h, w)`."""
    strong = (_gradient(true) > 0.25).float()[:, None]
    return F.max_pool2d(strong, 5, stride=1, padding=2)[:, 0] > 0


def _gradient(pictures: torch.Tensor) -> torch.Tensor:
    """Largest change of a channel to the right or down, `(n, h, w)`."""
    right = F.pad((pictures[..., 1:] - pictures[..., :-1]).abs(), (0, 1))
    down = F.pad((pictures[..., 1:, :] - pictures[..., :-1, :]).abs(), (0, 0, 0, 1))
    return torch.maximum(right, down).amax(dim=1)


def psnr(pictures: torch.Tensor, true: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """Mean over pictures in [0, 1], in dB."""
    errors = (pictures - true).square().mean(dim=1)
    if where is not None:
        means = torch.stack([own[mask].mean() for own, mask in zip(errors, where)])
    else:
        means = errors.mean(dim=(1, 2))
    return (-10 * means.clamp_min(1e-10).log10()).mean().item()


@torch.no_grad()
def measure(pictures: torch.Tensor, true: torch.Tensor, scenes: list, vq_model) -> dict:
    """Every measure of pictures in [0, 1] against the true ones."""
    found = {"psnr": psnr(pictures, true), "edge_psnr": psnr(pictures, true, edges(true))}
    features, wanted = (vq_model.semantic_features(2 * own - 1) for own in (pictures, true))
    found["feature_distance"] = (features - wanted).square().mean().item()
    mask = edges(true)
    found["sharpness"] = (_gradient(pictures)[mask].mean() / _gradient(true)[mask].mean()).item()
    referee = Referee(scenes[0].lattice)
    images = (pictures.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    found["read"] = float(np.mean([shows(referee.look(own), scene) for own, scene in zip(images, scenes)]))
    return {name: round(value, 4) for name, value in found.items()}


def draw_figures(result: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, (name, label) in zip(
        axes, (("psnr", "PSNR, dB"), ("feature_distance", "feature distance"), ("sharpness", "edge sharpness"))
    ):
        for steps in dict.fromkeys(own["steps"] for own in result["curve"]):
            own = [point for point in result["curve"] if point["steps"] == steps]
            axis.plot([each["strength"] for each in own], [each[name] for each in own], "o-", label=f"{steps} steps")
        axis.axhline(result["decoder"][name], color="tab:gray", linestyle="--", label="decoder")
        axis.set_xlabel("strength")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=7)
    save_figure(figure, folder / "refiner_curve.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refiner", default=REFINERS["mini"])
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--strength", type=float, default=1.0, help="of the main comparison")
    parser.add_argument("--steps", type=int, default=4, help="of the main comparison, from noise alone")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=RESULTS / "refiner.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    refiner = NextFlowRefinerPipeline.from_pretrained(args.refiner)
    refiner.set_progress_bar_config(disable=True)
    vq_model = refiner.vq_model.eval()
    source = SceneSource((128, 128), args.scenes, 33, "test", "free")
    scenes = [source.scene(index) for index in range(args.scenes)]
    large = torch.from_numpy(to_pixels(np.stack([source.image(index) for index in range(args.scenes)])))
    small = F.avg_pool2d(large, 2)
    assert scenes[0].lattice == lattice_for((64, 64))
    encoding = vq_model.encode(small)
    decoded = (vq_model.decode(encoding.codes, encoding.grids) + 1) / 2
    true, true_large = (small + 1) / 2, (large + 1) / 2

    def refine(strength: float, steps: int, upsampling: int = 1) -> torch.Tensor:
        # As many steps are taken as are asked for, whatever the strength.
        sigmas = np.linspace(strength, strength / steps, steps).tolist() if strength else None
        return refiner(
            codes=encoding.codes,
            grids=encoding.grids,
            strength=strength,
            sigmas=sigmas,
            upsampling=upsampling,
            generator=[torch.Generator().manual_seed(index) for index in range(args.scenes)],
            output_type="pt",
        ).images

    # 1. At equal size.
    result = {"decoder": measure(decoded, true, scenes, vq_model)}
    took = seconds(lambda: result.update(refined=refine(args.strength, args.steps)))
    result["refined"] = {
        **measure(result["refined"], true, scenes, vq_model),
        "milliseconds_per_picture": round(1000 * took / args.scenes, 1),
    }
    # 2. Doubled.
    bicubic = F.interpolate(decoded, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
    result["bicubic"] = measure(bicubic, true_large, scenes, vq_model)
    result["doubled"] = measure(refine(args.strength, args.steps, 2), true_large, scenes, vq_model)
    # 3. The curve.
    result["curve"] = []
    for steps in STEPS:
        for strength in STRENGTHS:
            own = measure(refine(strength, steps), true, scenes, vq_model)
            result["curve"].append({"steps": steps, "strength": strength, **own})
            print(result["curve"][-1], flush=True)
    arguments = {name: str(value) for name, value in vars(args).items() if name not in ("output", "refiner")}
    write_json(args.output, {**record(args.threads), "arguments": arguments, **result})
    draw_figures(result, DOCUMENT.parent / "images")

    header = ["", "PSNR, dB", "PSNR at edges, dB", "feature distance", "edge sharpness", "read right"]
    rows = [
        [name, *(f"{result[key][own]:.{digits}f}" for own, digits in _SHOWN)]
        for name, key in (
            ("the decoder, 64 px", "decoder"),
            (f"refined: strength {args.strength}, {args.steps} steps", "refined"),
            ("the decoder, bicubic to 128 px", "bicubic"),
            (f"doubled to 128 px: strength {args.strength}, {args.steps} steps", "doubled"),
        )
    ]
    text = DOCUMENT.read_text()
    figure = "![Fidelity and detail against strength and steps](images/refiner_curve.png)"
    body = f"{BEGIN}\n{table(header, rows)}\n\n{figure}\n{END}"
    DOCUMENT.write_text(text[: text.index(BEGIN)] + body + text[text.index(END) + len(END) :])
    print(table(header, rows))


_SHOWN = (("psnr", 2), ("edge_psnr", 2), ("feature_distance", 4), ("sharpness", 2), ("read", 3))


if __name__ == "__main__":
    main()
