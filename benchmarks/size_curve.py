"""How well decoders of several sizes draw for the same steps, and for the same compute.

Each size is trained from nothing on one world of the mini recipes (orderly scenes, whose coarse scales alone come
first, then whole pictures), with the same pictures in the same order. Scored at the end of the coarse scales' phase and
along the second: the image loss on validation combinations, and the share of pictures that the referee passes, on
trained and on validation combinations. Compute is what `Trainer` counted: six floating-point operations per parameter
and token.

    python benchmarks/size_curve.py

writes `benchmarks/results/size_curve.json` (a killed run goes on), the table and the figure in `docs/abilities.md`.
Small sizes are what it compares: none of these runs is long enough to draw as the bundled checkpoint does.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, record, save_figure, table, write_json
from learning_curve import load_checkpoint

from nextflow_hf import BUNDLED
from nextflow_hf.evaluation import score_drawing
from nextflow_hf.inference import load
from nextflow_hf.scenes import SceneSource
from nextflow_hf.training.data import to_pixels
from nextflow_hf.training.recipe import Recipe
from nextflow_hf.training.sequences import SequenceBuilder
from nextflow_hf.training.train_decoder import train_decoder

SIZE = (64, 64)
# Width, layers.
SIZES = ((128, 4), (192, 5), (256, 6))
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "abilities.md"
BEGIN, END = "<!-- size curve: begin -->", "<!-- size curve: end -->"
SAMPLING = {"guidance_scale": 0.0, "temperature": [1.0, 0.0], "top_p": [0.9, 1.0], "top_k": 0}


def recipes_of(width: int, layers: int, folder: Path, args: argparse.Namespace) -> list[Recipe]:
    """The two phases of one size: coarse scales, whole pictures."""
    parts = {"tokenizer": str(folder / "tokenizer"), "vq": str(folder / "vq")}
    text = {
        "hidden_size": width,
        "intermediate_size": 11 * width // 4 // 8 * 8,
        "num_hidden_layers": layers,
        # Heads of 64, as wide as the sections of their rotary positions.
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
    }
    own = folder / f"{width}x{layers}"
    recipes = []
    for phase, steps, batch, prefix in (
        ("coarse", args.coarse_steps, args.coarse_batch, 4),
        ("whole", args.steps, args.batch, None),
    ):
        recipes.append(
            Recipe(
                stage="decoder",
                output_dir=str(own / phase),
                init_from={**parts, **({} if phase == "coarse" else {"decoder": str(own / "coarse" / "final")})},
                config={f"text.{name}": value for name, value in text.items()} if phase == "coarse" else {},
                source={
                    "class": "nextflow_hf.scenes:SceneSource",
                    "size": list(SIZE),
                    "num_pictures": args.pictures,
                    "arrangement": "orderly",
                    "seed": 6,
                },
                stage_args={
                    "codes": str(folder / "codes.safetensors"),
                    "read_share": 0.0,
                    "prompt_dropout": 0.0,
                    "epochs": 1000,
                    "ema_decay": 0.98,
                    "sampling": SAMPLING,
                    **({"prefix_scales": prefix} if prefix else {}),
                },
                trainer={
                    "max_steps": steps,
                    "per_device_train_batch_size": batch,
                    "bf16": args.bf16,
                    "learning_rate": 2e-3,
                    "lr_scheduler_type": "constant_with_warmup" if phase == "coarse" else "linear",
                    "warmup_steps": 50,
                    "weight_decay": 0.05,
                    "adam_beta2": 0.95,
                    "save_steps": args.every,
                    "save_total_limit": 100,
                },
            )
        )
    return recipes


@torch.no_grad()
def image_loss(model, processor, pictures: int) -> float:
    """Mean cross-entropy of a code of validation combinations, every scale weighing alike."""
    source = SceneSource(SIZE, pictures, 17, "validation", "orderly")
    images = np.stack([source.image(index) for index in range(pictures)])
    codes, grids = model.model.encode_images(torch.from_numpy(to_pixels(images)))
    builder = SequenceBuilder(processor.tokenizer, model.config, None)
    losses = []
    for first in range(0, pictures, 32):
        items = [
            builder.draw(source.prompt(index, np.random.default_rng(index)), codes[index].tolist(), grids[index])
            for index in range(first, min(first + 32, pictures))
        ]
        losses.append(model(**builder.collate(items)).image_loss.item())
    return sum(losses) / len(losses)


def score(folder: Path, recipe: Recipe, tests: int) -> dict:
    """Loss and scores of a checkpoint."""
    model, processor = load_checkpoint(folder, recipe)
    drawn = {
        split: score_drawing(model, processor, tests, 1, split)["overall"]["score"] for split in ("train", "validation")
    }
    return {"image_loss": round(image_loss(model, processor, 192), 3), **drawn}


def draw_figure(points: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name in dict.fromkeys(own["size"] for own in points):
        own = [point for point in points if point["size"] == name]
        label = f"{name} ({own[0]['parameters'] / 1e6:.1f}M)"
        for axis, measure in zip(axes, ("image_loss", "train")):
            axis.plot([each["pflop"] for each in own], [each["scores"][measure] for each in own], "o-", label=label)
    axes[0].set_ylabel("image loss, validation combinations")
    axes[1].set_ylabel("pictures that pass, trained combinations")
    for axis in axes:
        axis.set_xlabel("training compute, 10^15 FLOP")
        axis.set_xscale("log")
        axis.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--coarse-steps", type=int, default=700)
    parser.add_argument("--coarse-batch", type=int, default=48)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--every", type=int, default=80, help="steps between the checkpoints that are scored")
    parser.add_argument("--tests", type=int, default=40, help="prompts of each of six categories")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, default=Path("runs/size"))
    parser.add_argument("--output", type=Path, default=RESULTS / "size_curve.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not (args.folder / "vq").is_dir():
        model, processor = load(BUNDLED["mini"])
        processor.tokenizer.save_pretrained(args.folder / "tokenizer")
        model.vq_model.save_pretrained(args.folder / "vq")
    settings = {
        name: getattr(args, name) for name in ("pictures", "coarse_steps", "coarse_batch", "steps", "batch", "tests")
    }
    done = json.loads(args.output.read_text()) if args.output.is_file() else {}
    points = done["points"] if done.get("settings") == settings else []
    for width, layers in SIZES:
        name = f"{width}x{layers}"
        missing = [
            step
            for step in range(args.every, args.steps + 1, args.every)
            if not any((own["size"], own["step"]) == (name, step) for own in points)
        ]
        if not missing:
            continue
        coarse, whole = recipes_of(width, layers, args.folder, args)
        for recipe in (coarse, whole):
            if not (Path(recipe.output_dir) / "final").is_dir():
                train_decoder(recipe)
        flops = json.loads((Path(coarse.output_dir) / "trainer_state.json").read_text())["total_flos"] / 1e15
        for step in missing:
            own = {"size": name, "step": step}
            folder = Path(whole.output_dir) / f"checkpoint-{step}"
            state = json.loads((folder / "trainer_state.json").read_text())
            model, _ = load_checkpoint(folder, whole)
            own["parameters"] = sum(p.numel() for name, p in model.named_parameters() if "vq_model" not in name)
            own["pflop"] = round(flops + state["total_flos"] / 1e15, 5)
            points.append({**own, "scores": score(folder, whole, args.tests)})
            print(points[-1], flush=True)
            write_json(args.output, {**record(args.threads), "settings": settings, "points": points})
    path = DOCUMENT.parent / "images" / "size_curve.png"
    draw_figure(points, path)
    header = [
        "width x layers",
        "parameters",
        "steps",
        "10^15 FLOP",
        "image loss",
        "drawn, trained",
        "drawn, validation",
    ]
    rows = [
        [
            own["size"],
            f"{own['parameters'] / 1e6:.1f}M",
            args.coarse_steps + own["step"],
            f"{own['pflop']:.3f}",
            f"{own['scores']['image_loss']:.2f}",
            f"{own['scores']['train']:.2f}",
            f"{own['scores']['validation']:.2f}",
        ]
        for own in points
    ]
    text = DOCUMENT.read_text()
    body = f"{BEGIN}\n{table(header, rows)}\n\n![Scores against size and compute](images/{path.name})\n{END}"
    DOCUMENT.write_text(text[: text.index(BEGIN)] + body + text[text.index(END) + len(END) :])
    print(table(header, rows))


if __name__ == "__main__":
    main()
