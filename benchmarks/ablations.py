"""The paper's ablations in miniature: what each choice of NextFlow does to a very small model, told as it came out.

The world has one large object (four shapes, eight colours) at one of nine named places on three backgrounds, at 32 px
(four scales), and at 64 px (six) where a question is about entering a higher resolution. Everything of a question is
equal but the choice it is about: steps, batch, pictures, tokenizer, seed. A tokenizer is trained for every seed (its
CNNs and encoder start from the bundled one's, its codebook is new), then a decoder from random weights that draws
(three quarters of the sequences) and describes (one quarter).

Measured after training, on scenes of combinations of colour, shape and place that training never saw, and of those it
saw:

* drawing: share of pictures in which the referee finds exactly what was asked for (`seen`, `unseen`);
* captions: share of descriptions of unseen combinations that are complete and right;
* image loss: cross-entropy per code of unseen pictures, every code counted alike, inputs not corrupted;
* text loss: cross-entropy per token of their descriptions.

    python benchmarks/ablations.py              # runs what is missing, then writes the table and the plot
    python benchmarks/ablations.py --only heads # one question alone

Every run ends in `benchmarks/results/ablations.json` at once, so a killed command goes on where it was. Tokenizers and
codes are kept in `runs/ablations`.
"""

import argparse
import json
import statistics
import time
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, record, save_figure, write_json
from transformers import PreTrainedTokenizerFast

from nextflow_hf.inference import describe_pictures, draw_prompts, load
from nextflow_hf.modeling import modeling_nextflow
from nextflow_hf.modeling.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.modeling.modeling_nextflow_vq import NextFlowVQModel
from nextflow_hf.processing.processing_nextflow import NextFlowProcessor
from nextflow_hf.processing.tokenization_nextflow import train_tokenizer
from nextflow_hf.scenes import (
    BACKGROUNDS,
    COLORS,
    QUESTION,
    Facts,
    Group,
    Referee,
    Scene,
    SceneObject,
    describe,
    facts_match,
    is_complete,
    parse,
    render,
)
from nextflow_hf.scenes.captions import words_of
from nextflow_hf.scenes.world import named_cells
from nextflow_hf.training.data import to_pixels
from nextflow_hf.training.sequences import CodedImage, SequenceBuilder

RUNS = Path("runs/ablations")
DOCUMENT = Path("docs/ablations.md")
PLOT = Path("docs/images/ablations.png")
SHAPES = ("circle", "square", "cross", "diamond")
LATTICE = (4, 4)
TEXT_VOCABULARY = 512
# Share of the combinations of colour, shape and place that training never sees.
HELD_OUT = 0.15
METRICS = ("seen", "unseen", "captions", "image_loss", "text_loss")
# Two-sided 95 % quantiles of Student's t for 2, 3, ... runs.
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


# The document's prose is written by hand; the tables stand between these lines.
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        tokenizer: "dual" or "single" (no semantic branch; the index is the pixel part's alone).
        config: Entries of the decoder's configuration.
        corruption: Share of each scale's codes that self-correction samples from the nearest `TOP_K`.
        heads: 1, or 2: a softmax over text tokens and another over codes.
        text_share: Share of the sequences that are text alone.
        size: Side of the pictures in pixels. 64 goes on from the same seed's base run at 32.
    """

    tokenizer: str = "dual"
    config: dict = field(default_factory=dict)
    corruption: float = 0.0
    heads: int = 1
    text_share: float = 0.0
    size: int = 32


TOP_K = 4
BASE = Variant(config={"scale_loss_alpha": 0.0})


def _of(**changes) -> Variant:
    return Variant(**{**vars(BASE), **changes, "config": {**BASE.config, **changes.get("config", {})}})


_ACCUMULATED = {"visual_input": "accumulated"}
# Question -> title, its variants by name, and the metrics that can be compared between them.
QUESTIONS = {
    "codebook": ("Dual or single codebook", {"dual": BASE, "single": _of(tokenizer="single")}, METRICS[:3]),
    "heads": ("One head or two", {"one head": BASE, "two heads": _of(heads=2)}, METRICS),
    "input": (
        "Residual or accumulated inputs, and self-correction",
        {
            "residual, 0 %": BASE,
            "residual, 30 %": _of(corruption=0.3),
            "residual, 60 %": _of(corruption=0.6),
            "accumulated, 0 %": _of(config=_ACCUMULATED),
            "accumulated, 30 %": _of(config=_ACCUMULATED, corruption=0.3),
            "accumulated, 60 %": _of(config=_ACCUMULATED, corruption=0.6),
        },
        METRICS,
    ),
    "alpha": (
        "Scale reweighting on entering the higher resolution (64 px)",
        {f"alpha {alpha}": _of(size=64, config={"scale_loss_alpha": alpha}) for alpha in (0.0, 0.5, 0.9, 1.2)},
        METRICS,
    ),
    "text": ("Text in the mix", {"no text": BASE, "25 % text": _of(text_share=0.25)}, METRICS),
    "context": (
        "What later text sees of a picture",
        {
            "scales": BASE,
            "scales+final": _of(config={"context_image": "scales+final"}),
            "final": _of(config={"context_image": "final"}),
        },
        METRICS,
    ),
}


@dataclass(frozen=True)
class Effort:
    """Steps and batch sizes, the same for all that are compared."""

    tokenizer_steps: int = 200
    tokenizer_batch: int = 16
    steps: int = 800
    batch: int = 24
    steps_64: int = 300
    batch_64: int = 12
    pictures: int = 3000
    measured: int = 128


# ---- the world -------------------------------------------------------------------------------------------------------


def draw_scene(rng: np.random.Generator, split: str) -> Scene:
    """A large object whose combination of colour, shape and place belongs to the split."""
    places = named_cells("large", LATTICE)
    while True:
        shape, color = SHAPES[rng.integers(len(SHAPES))], tuple(COLORS)[rng.integers(len(COLORS))]
        cell, place = list(places.items())[rng.integers(len(places))]
        background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        is_held_out = zlib.crc32(f"{color} {shape} {place}".encode()) / 2**32 < HELD_OUT
        if is_held_out == (split == "test"):
            return Scene((SceneObject(shape, color, "large", cell),), background, LATTICE)


def facts_of(scene: Scene) -> Facts:
    """All that there is to say, with the place."""
    (own,) = scene.objects
    place = named_cells(own.size, scene.lattice)[own.cell]
    return Facts((Group(1, own.shape, own.color, own.size, place),), None, scene.background)


def scenes(number: int, seed: int, split: str) -> list[Scene]:
    rng = np.random.default_rng((seed, ("train", "test").index(split)))
    return [draw_scene(rng, split) for _ in range(number)]


def pixels_of(own: list[Scene], size: int) -> torch.Tensor:
    """float32 `(n, 3, size, size)` in [-1, 1]."""
    return torch.from_numpy(to_pixels(np.stack([render(scene, (size, size)) for scene in own])))


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@cache
def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of this world's own words, whatever the one in the box knows by now."""
    told = scenes(2000, 0, "train")
    texts = [
        f"{role}\n{text}" for s in told for role, text in (("user", words_of(facts_of(s))), ("assistant", describe(s)))
    ]
    return train_tokenizer([*texts, f"user\n{QUESTION}"], TEXT_VOCABULARY)


def tokenizer_for(kind: str, seed: int, effort: Effort) -> NextFlowVQModel:
    """The tokenizer of a seed, trained once."""
    folder = RUNS / f"{kind}-{seed}-{effort.tokenizer_steps}x{effort.tokenizer_batch}"
    if folder.is_dir():
        return NextFlowVQModel.from_pretrained(folder).eval()
    bundled, _ = load("mini")
    teacher = bundled.vq_model.semantic_encoder.requires_grad_(False).eval()
    torch.manual_seed(seed)
    config = bundled.config.vq_config.to_dict()
    if kind == "single":
        config |= {"semantic_dim": 0, "semantic_weight": 0.0}
    model = NextFlowVQModel(type(bundled.config.vq_config)(**config))
    own = model.state_dict()
    start = {
        name: value
        for name, value in bundled.vq_model.state_dict().items()
        if not name.startswith("codebook") and own[name].shape == value.shape
    }
    model.load_state_dict(start, strict=False)
    train = scenes(effort.tokenizer_steps * effort.tokenizer_batch, seed, "train")
    model.train().start_codebook([pixels_of(train[:128], 32)], torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, effort.tokenizer_steps, pct_start=0.1)
    for step in range(effort.tokenizer_steps):
        batch = train[step * effort.tokenizer_batch : (step + 1) * effort.tokenizer_batch]
        loss = 0.0
        # Mostly the low resolution, where most of the questions are.
        for size, part in ((32, batch[: 3 * len(batch) // 4]), (64, batch[3 * len(batch) // 4 :])):
            pixels = pixels_of(part, size)
            with torch.no_grad():
                targets = model.semantic_features(pixels, teacher)
            loss = loss + model(pixels, semantic_targets=targets).loss * (len(part) / len(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder.with_name(f"{folder.name}.unfinished"))
    folder.with_name(f"{folder.name}.unfinished").rename(folder)
    return model


@torch.no_grad()
def code_pictures(
    vq_model: NextFlowVQModel, own: list[Scene], size: int, corruption: float, seed: int
) -> list[CodedImage]:
    """Codes of pictures, with self-correction at a share of them."""
    coded = []
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(own), 100):
        pixels = pixels_of(own[first : first + 100], size)
        encoding = vq_model.encode(
            pixels, top_k=TOP_K if corruption else None, corruption=corruption, generator=generator
        )
        for codes, fed in zip(encoding.codes.tolist(), encoding.input_codes.tolist()):
            coded.append(CodedImage(codes, encoding.grids, fed))
    return coded


# ---- decoders --------------------------------------------------------------------------------------------------------


def new_decoder(variant: Variant, vq_model: NextFlowVQModel) -> NextFlowForConditionalGeneration:
    """A decoder of three layers with random weights."""
    own = {"code_start_id": TEXT_VOCABULARY, **variant.config}
    config = NextFlowConfig.from_preset("nextflow-mini", vq_config=vq_model.config, **own)
    text = config.text_config.to_dict()
    text.update(vocab_size=TEXT_VOCABULARY + vq_model.config.codebook_size)
    text.update(hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4, layer_types=None)
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [4, 6, 6]}
    config.text_config = type(config.text_config)(**text)
    model = NextFlowForConditionalGeneration(config)
    model.set_vq_model(vq_model)
    model.config.codebook_fingerprint = vq_model.fingerprint()
    return model


def two_head_cross_entropy(head, hidden_states, labels, weights, sizes, first_code: int):
    """As `chunked_cross_entropy`, but text tokens compete with text tokens alone, and codes with codes."""
    losses = hidden_states.new_zeros(len(labels))
    for own, rows, first in (
        (labels < first_code, head.weight[:first_code], 0),
        (labels >= first_code, head.weight[first_code:], first_code),
    ):
        losses[own] = F.cross_entropy(hidden_states[own] @ rows.T, labels[own] - first, reduction="none")
    return tuple(own.sum() for own in (losses * weights).split(sizes)), losses.detach()


def heads_of(variant: Variant, model: NextFlowForConditionalGeneration):
    """Context in which the model's loss has the variant's heads."""
    if variant.heads == 1:
        return nullcontext()
    own = partial(two_head_cross_entropy, first_code=model.config.code_start_id)
    return mock.patch.object(modeling_nextflow, "chunked_cross_entropy", own)


def train(
    variant: Variant,
    seed: int,
    effort: Effort,
    tokenizer: PreTrainedTokenizerFast,
    vq_model: NextFlowVQModel,
    start: NextFlowForConditionalGeneration | None,
) -> NextFlowForConditionalGeneration:
    """Train a decoder: from random weights, or from `start` at the higher resolution."""
    steps, batch = (effort.steps, effort.batch) if variant.size == 32 else (effort.steps_64, effort.batch_64)
    torch.manual_seed(seed)
    if start is None:
        model = new_decoder(variant, vq_model)
    else:
        model = start
        for name, value in variant.config.items():
            setattr(model.config, name, value)
    pictures = scenes(effort.pictures, seed, "train")
    clean = code_pictures(vq_model, pictures, variant.size, 0.0, seed)
    fed = code_pictures(vq_model, pictures, variant.size, variant.corruption, seed) if variant.corruption else clean
    builder = SequenceBuilder(tokenizer, model.config)
    rng = np.random.default_rng(seed)

    def sequence() -> dict:
        index = int(rng.integers(len(pictures)))
        kind = rng.random()
        if kind < variant.text_share:
            text = [{"role": None, "content": words_of(facts_of(draw_scene(rng, "train")))}]
            return builder.build(text, [])
        if (kind - variant.text_share) / (1 - variant.text_share) < 0.25:
            return builder.read(QUESTION, describe(pictures[index]), clean[index].codes, clean[index].grids)
        prompt = words_of(facts_of(pictures[index]))
        return builder.draw(prompt, fed[index].codes, fed[index].grids, fed[index].input_codes)

    trained = [parameter for name, parameter in model.named_parameters() if not name.startswith("model.vq_model")]
    peak = 3e-3 if start is None else 1.5e-3
    optimizer = torch.optim.AdamW(trained, peak, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.1)
    model.train()
    model.vq_model.requires_grad_(False).eval()
    with heads_of(variant, model):
        for _ in range(steps):
            loss = model(**builder.collate([sequence() for _ in range(batch)])).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


# ---- measures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    variant: Variant, model: NextFlowForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, effort: Effort
) -> dict[str, float]:
    size = (variant.size, variant.size)
    _, bundled = load("mini")
    processor = NextFlowProcessor(bundled.image_processor, tokenizer, context_image=model.config.context_image)
    processor.image_processor.resolution = variant.size
    model.config.trained_image_sizes = [list(size)]
    referee = Referee(LATTICE)
    result = {}
    unseen = scenes(effort.measured, 10_000, "test")
    for name, own in (("seen", scenes(effort.measured, 10_000, "train")), ("unseen", unseen)):
        facts = [facts_of(scene) for scene in own]
        prompts, seeds = [words_of(one) for one in facts], list(range(len(own)))
        # The first code is drawn, what follows from it is not: codes of one scale do not know each other.
        pictures = draw_prompts(
            model, processor, prompts, seeds, guidance_scale=0.0, temperature=[1.0, 0.0], top_k=0, top_p=0.9
        )
        result[name] = statistics.fmean(referee.judge(one, wanted).passed for one, wanted in zip(pictures, facts))
    answers = describe_pictures(model, processor, [render(scene, size) for scene in unseen])
    told = [parse(answer) for answer in answers]
    result["captions"] = statistics.fmean(
        own is not None and is_complete(own) and facts_match(own, scene) for own, scene in zip(told, unseen)
    )
    builder = SequenceBuilder(tokenizer, model.config)
    coded = code_pictures(model.vq_model, unseen, variant.size, 0.0, 0)
    drawn = [builder.draw(words_of(facts_of(s)), own.codes, own.grids) for s, own in zip(unseen, coded)]
    read = [builder.read(QUESTION, describe(s), own.codes, own.grids) for s, own in zip(unseen, coded)]
    alpha, model.config.scale_loss_alpha = model.config.scale_loss_alpha, 0.0
    with heads_of(variant, model):
        result["image_loss"] = model(**builder.collate(drawn)).image_loss.item()
        result["text_loss"] = model(**builder.collate(read)).text_loss.item()
    model.config.scale_loss_alpha = alpha
    return {name: round(value, 4) for name, value in result.items()}


def run(variant: Variant, seed: int, effort: Effort) -> dict:
    """Train and measure one variant."""
    begun = time.perf_counter()
    tokenizer = text_tokenizer()
    vq_model = tokenizer_for(variant.tokenizer, seed, effort)
    start = None
    if variant.size == 64:
        folder = RUNS / f"base-{seed}-{effort.steps}x{effort.batch}"
        if not folder.is_dir():
            base = train(BASE, seed, effort, tokenizer, vq_model, None)
            base.save_pretrained(folder.with_name(f"{folder.name}.unfinished"))
            folder.with_name(f"{folder.name}.unfinished").rename(folder)
        start = NextFlowForConditionalGeneration.from_pretrained(folder)
    model = train(variant, seed, effort, tokenizer, vq_model, start)
    return {**measure(variant, model, tokenizer, effort), "seconds": round(time.perf_counter() - begun, 1)}


# ---- the table and the plot ------------------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    quantile = T_QUANTILES[min(len(values) - 2, len(T_QUANTILES) - 1)]
    return mean, quantile * statistics.stdev(values) / len(values) ** 0.5


def key_of(variant: Variant, seed: int) -> str:
    """A run's name in the results: the same training is run once, whatever questions share it."""
    changed = {name: value for name, value in vars(variant).items() if value != getattr(Variant(), name)}
    return json.dumps({**changed, "seed": seed}, sort_keys=True)


def tables(runs: dict, seeds: int) -> str:
    """Markdown tables for each question that has runs: every way, and its difference from the first seed by seed."""
    titles = {
        "seen": "drawing, seen",
        "unseen": "drawing, unseen",
        "captions": "captions, unseen",
        "image_loss": "image loss",
        "text_loss": "text loss",
    }
    parts = []
    for title, variants, metrics in QUESTIONS.values():
        head = " | ".join(titles[name] for name in metrics)
        by_seed = {
            name: {seed: runs[key] for seed in range(seeds) if (key := key_of(variant, seed)) in runs}
            for name, variant in variants.items()
        }
        first = next(iter(by_seed))
        own = [[name, list(found.values())] for name, found in by_seed.items()]
        # Seeds share data and tokenizer, so that a difference varies less than what it is taken of.
        differences = [
            [name, [{m: run[m] - by_seed[first][seed][m] for m in metrics} for seed, run in found.items()]]
            for name, found in by_seed.items()
            if name != first and found.keys() <= by_seed[first].keys()
        ]
        for label, rows in (("", own), (f"minus {first}, seed by seed", differences)):
            lines = [f"| {label} | runs | {head} |", "|---|---:|" + "---:|" * len(metrics)]
            for name, found in rows:
                intervals = [interval([run[metric] for run in found]) if found else None for metric in metrics]
                sign = "+" if label else ""
                cells = ["" if own is None else f"{own[0]:{sign}.3f} ± {own[1]:.3f}" for own in intervals]
                lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
            parts.append("\n".join(lines if label else [f"## {title}", "", *lines]))
    return "\n\n".join(parts)


def plot(runs: dict, seeds: int, path: Path) -> None:
    """Drawing scores of every variant: seeds as points, mean and 95 % interval beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 7), sharey=True)
    for axis, (title, variants, _) in zip(axes.flat, QUESTIONS.values()):
        for shift, metric, color in ((-0.12, "seen", "tab:gray"), (0.12, "unseen", "tab:blue")):
            for place, variant in enumerate(variants.values()):
                own = [runs[key][metric] for seed in range(seeds) if (key := key_of(variant, seed)) in runs]
                if own:
                    mean, half = interval(own)
                    axis.errorbar(place + shift, mean, yerr=half, fmt="o", color=color, capsize=4)
                    axis.scatter([place + shift + 0.06] * len(own), own, s=9, color=color, alpha=0.5)
            axis.plot([], [], "o", color=color, label=metric)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(variants)), variants, rotation=20, fontsize=8)
        axis.set_ylim(0, 1)
    axes[0, 0].legend(fontsize=8)
    axes[0, 0].set_ylabel("pictures that pass")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=QUESTIONS, nargs="+", default=list(QUESTIONS), help="questions to answer")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in vars(Effort()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--output", type=Path, default=RESULTS / "ablations.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    effort = Effort(**{name: getattr(args, name) for name in vars(Effort())})
    result = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if result and result["effort"] != vars(effort):
        parser.error(f"{args.output} holds runs of another effort, {result['effort']}; name another --output")
    result = {"effort": vars(effort), "runs": {}, **result, **record(args.threads)}

    # Seed by seed, so that a table of fewer seeds is complete first.
    for seed in range(args.seeds):
        for question in args.only:
            for name, variant in QUESTIONS[question][1].items():
                key = key_of(variant, seed)
                if key not in result["runs"]:
                    result["runs"][key] = run(variant, seed, effort)
                    write_json(args.output, result)
                    print(f"{question}: {name}, seed {seed}: {result['runs'][key]}", flush=True)

    text = tables(result["runs"], args.seeds)
    print(text)
    plot(result["runs"], args.seeds, PLOT)
    before, after = DOCUMENT.read_text().split(BEGIN)[0], DOCUMENT.read_text().split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
