"""Scores of a checkpoint on scenes: drawing by the referee, captions by their facts, the tokenizer by its pictures."""

import hashlib
import platform
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers

from . import ADAPTERS, BUNDLED, __version__
from .abilities import (
    AFTER_A_THOUGHT,
    IN_WORDS,
    SCORES_IN_WORDS,
    Tested,
    a_quarter,
    score_abilities,
    score_words,
    shows,
)
from .in_words import DRAFTS, GUESSES, THINK, adapter_for, add_adapter
from .inference import describe_pictures, draw_prompts, load
from .intervals import interval, resample, summarize
from .modeling.configuration_nextflow import NextFlowVQConfig
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .processing.processing_nextflow import NextFlowProcessor
from .scenes import (
    CATEGORIES,
    Referee,
    SceneSource,
    calibrate,
    facts_match,
    is_complete,
    lattice_for,
    make_prompts,
    parse,
)
from .scenes.signs import DOCUMENT_SIZE, FREE_PROMPTS, SIGN_SIZE, UNTAUGHT_PROMPTS, ask_freely

_IMAGES_AT_OTHER_SIZES = 1
# What takes long, and so has fewer tests in [`abilities`].
_SCORED_BY_A_QUARTER = ("masked edits", "stories", "instructions", "films")


def score_drawing(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    prompts_per_category: int = 100,
    images_per_prompt: int = 4,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 64,
    size: tuple[int, int] | None = None,
    **sampling,
) -> dict:
    """The strict scenes score: a picture counts if it shows exactly the objects asked for and nothing else.

    `size` is (height, width) in pixels; by default the checkpoint's first. `sampling` goes to `generate`.

    Returns:
        `overall` and each category: `score` (share of pictures that pass), and `low`, `high` of the 95 % interval from
        resampling prompts.
    """
    size = _first_size(model) if size is None else size
    referee = Referee(lattice_for(size))
    prompts = [p for category in CATEGORIES for p in make_prompts(category, prompts_per_category, split, seed)]
    jobs = [(index, image) for index in range(len(prompts)) for image in range(images_per_prompt)]
    pictures = draw_prompts(
        model,
        processor,
        [prompts[index].text for index, _ in jobs],
        [seed + 1000 * index + image for index, image in jobs],
        batch_size,
        image_size=size,
        **sampling,
    )
    passed = np.array([referee.judge(own, prompts[index].facts).passed for (index, _), own in zip(jobs, pictures)])
    by_category = passed.reshape(len(CATEGORIES), prompts_per_category, images_per_prompt).mean(axis=-1)
    resampled = resample(by_category, np.random.default_rng(0))
    result = {"overall": summarize(by_category.mean(), resampled.mean(axis=0))}
    for name, scores, draws in zip(CATEGORIES, by_category, resampled):
        result[name] = summarize(scores.mean(), draws)
    return result


def score_captions(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    n: int = 500,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 64,
) -> dict:
    """Share of held-out pictures whose description, read back to facts, is complete and right in everything."""
    source = SceneSource(_first_size(model), n, seed + 100_000, split)
    answers = describe_pictures(model, processor, [source.image(index) for index in range(n)], batch_size=batch_size)
    right = []
    for index, text in enumerate(answers):
        facts = parse(text)
        right.append(facts is not None and is_complete(facts) and facts_match(facts, source.scene(index)))
    return interval(right)


def score_tokenizer(
    vq_model, size: tuple[int, int] = (64, 64), n: int = 500, split: str = "test", seed: int = 0
) -> dict:
    """Reconstruction of held-out pictures at every prefix of the scales, and how much of the codebook is used.

    Returns:
        `psnr`: dB of the mean squared error of all pictures, in 8-bit levels; `psnr_per_scale`: for 1, 2, ... scales;
        `codebook_use`: share of codes chosen at least once over `n` pictures; `readable`: share of round trips that the
        referee reads as the original's facts; `readable_first_scales`: the same of the smaller pictures that first
        scales are, by their number, where the tokenizer shows such.
    """
    source = SceneSource(size, n, seed + 200_000, split)
    referee = Referee(lattice_for(size))
    smaller = [own["num_scales"] for own in _first_scales(vq_model.config, size).values()]
    errors, used, read = [], set(), dict.fromkeys([None, *smaller], 0)
    for first in range(0, n, 50):
        indices = range(first, min(first + 50, n))
        images = np.stack([source.image(i) for i in indices])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        encoding = vq_model.encode(pixels.to(vq_model.device))
        used.update(encoding.codes.unique().tolist())
        counts = np.cumsum([h * w for h, w in encoding.grids])
        row = []
        for count in counts:
            decoded = ((vq_model.decode(encoding.codes[:, :count], encoding.grids).cpu() + 1) * 127.5).round()
            row.append(((decoded - torch.from_numpy(images).permute(0, 3, 1, 2)) ** 2).mean(dim=(1, 2, 3)))
        errors.append(torch.stack(row, dim=1))
        for scales in read:
            if scales is not None:
                grids = encoding.grids[:scales]
                codes = encoding.codes[:, : sum(h * w for h, w in grids)]
                decoded = ((vq_model.decode(codes, grids).cpu() + 1) * 127.5).round()
            for picture, index in zip(decoded.byte().permute(0, 2, 3, 1).numpy(), indices):
                read[scales] += shows(referee.look(picture), source.scene(index))
    psnr = 10 * torch.log10(255**2 / torch.cat(errors).mean(dim=0))
    return {
        "psnr": round(psnr[-1].item(), 2),
        "psnr_per_scale": [round(value, 2) for value in psnr.tolist()],
        "codebook_use": round(len(used) / vq_model.codebook.size, 4),
        "readable": round(read.pop(None) / n, 4),
        **({"readable_first_scales": {str(own): round(right / n, 4) for own, right in read.items()}} if read else {}),
        "pictures": n,
    }


def evaluate_scenes(
    checkpoint: str,
    prompts_per_category: int = 100,
    images_per_prompt: int = 4,
    captions: int = 500,
    tests: int = 200,
    seed: int = 0,
    thinks: bool = False,
    **sampling,
) -> dict:
    """Everything that is measured of a checkpoint on scenes, with every setting that moves a score.

    The first of the checkpoint's sizes is measured in full; of the others, and of the smaller pictures that its first
    scales are, drawing with one picture a prompt. `tests` are those of each further ability ([`abilities`]), a quarter
    of them for masked edits, stories, instructions and films; 0 leaves them out, and so do 0 `captions`. With `thinks`,
    what concerns given pictures is scored after a thought as well.

    Raises:
        ValueError: If a checkpoint that does not think is to do so.
    """
    model, processor = load(checkpoint)
    if thinks and model.config.abilities is not None and "interleaved" not in model.config.abilities:
        raise ValueError(f"{checkpoint!r} does not think: it was trained for {sorted(model.config.abilities)}.")
    size, *other_sizes = _sizes(model)
    result = {
        "referee": calibrate(1000, size, seed),
        "tokenizer": score_tokenizer(model.vq_model, size, seed=seed),
        "drawing": score_drawing(model, processor, prompts_per_category, images_per_prompt, seed=seed, **sampling),
    }
    smaller = _first_scales(model.config.vq_config, size)
    others = {f"{own[0]}x{own[1]}": {"size": own} for own in other_sizes} | smaller
    if others:
        result["drawing_at_other_sizes"] = {
            name: score_drawing(
                model,
                processor,
                prompts_per_category,
                _IMAGES_AT_OTHER_SIZES,
                seed=seed,
                **{"size": size, **own},
                **sampling,
            )
            for name, own in others.items()
        }
    if captions and (model.config.abilities is None or "caption" in model.config.abilities):
        result["captions"] = score_captions(model, processor, captions, seed=seed)
    if tests:
        tested = Tested(model, processor, size, tests, seed, ways=("", AFTER_A_THOUGHT) if thinks else ("",))
        result["abilities"] = {f"{size[0]}x{size[1]}": score_abilities(tested)}
        if {SIGN_SIZE, DOCUMENT_SIZE} <= {size, *other_sizes}:
            result["abilities"]["words"] = score_words(tested)
    result["settings"] = {
        **_settings(model, checkpoint, seed, sampling),
        "image_size": list(size),
        "prompts_per_category": prompts_per_category,
        "images_per_prompt": images_per_prompt,
        "images_per_prompt_at_other_sizes": _IMAGES_AT_OTHER_SIZES,
        "captions": captions,
        "tests": tests,
        "tests_of": {name: a_quarter(tests) for name in _SCORED_BY_A_QUARTER} if tests else {},
        "thinks": thinks,
    }
    return result


def evaluate_in_words(
    checkpoint: str, tests: int = 200, seed: int = 0, adapter: str | None = None, split: str = "test", **sampling
) -> dict:
    """What concerns given pictures, by way of words ([`in_words`]), with every setting that moves a score.

    `adapter` is one for it; by default the bundled one, where the checkpoint is. `sampling` goes to `generate`.

    Raises:
        ValueError: If there is no test, or the checkpoint has no adapter and goes on from no words alone.
    """
    if tests < 1:
        raise ValueError(f"At least one test is needed, got tests={tests}.")
    model, processor = load(checkpoint)
    adapter = adapter_for(checkpoint, adapter)
    if adapter is not None:
        add_adapter(model, adapter)
    elif model.config.abilities is not None and "text" not in model.config.abilities:
        raise ValueError(f"{checkpoint!r} does not work in words: it was trained for {sorted(model.config.abilities)}.")
    size = _first_size(model)
    tested = Tested(model, processor, size, tests, seed, split, ways=(IN_WORDS,), sampling=sampling)
    scores = {name: own for score in SCORES_IN_WORDS for name, own in score(tested).items()}
    return {
        "abilities": {f"{size[0]}x{size[1]}": scores},
        "settings": {
            **_settings(model, checkpoint, seed, sampling, split, getattr(model, "drafting", None)),
            "guesses": GUESSES,
            "drafts": DRAFTS,
            "adapter_sha256": None if adapter is None else weights_hash(ADAPTERS.get(adapter, adapter)),
            "image_size": list(size),
            "tests": tests,
        },
    }


def evaluate_words(checkpoint: str, tests: int = 400, seed: int = 0, split: str = "test", **sampling) -> dict:
    """Words that a checkpoint of signs alone draws, by the reader, with every setting that moves a score.

    A word of up to five letters counts where the reader finds it to the letter; letters are 1 - normalised edit
    distance. No word of the splits "test" and "validation" was in training. The same words are asked for again in ways
    that examples did not have: those that rewards had (`FREE_PROMPTS`), and those that nothing had
    (`UNTAUGHT_PROMPTS`).

    Raises:
        ValueError: If there is no test, or the checkpoint was not trained to draw pictures of `SIGN_SIZE`.
    """
    if tests < 1:
        raise ValueError(f"At least one word is needed, got tests={tests}.")
    model, processor = load(checkpoint)
    if SIGN_SIZE not in _sizes(model):
        sizes = ["x".join(map(str, own)) for own in _sizes(model)]
        raise ValueError(f"Words are drawn at 48x80; {checkpoint!r} was trained to draw {sizes} (height x width).")
    tested = Tested(model, processor, SIGN_SIZE, tests, seed, split)
    scores = score_words(tested, document_share=0.0, **sampling)
    for label, ways in (("asked in other ways", FREE_PROMPTS), ("asked in untaught ways", UNTAUGHT_PROMPTS)):
        ask = partial(ask_freely, rng=np.random.default_rng(seed), ways=ways)
        asked = score_words(tested, document_share=0.0, prompt_of=ask, **sampling)
        scores |= {name.replace("drawn", f"drawn, {label}"): own for name, own in asked.items()}
    return {
        "words": scores,
        "settings": {
            **_settings(model, checkpoint, seed, sampling, split),
            "image_size": list(SIGN_SIZE),
            "tests": tests,
        },
    }


def _settings(model, checkpoint: str, seed: int, sampling: dict, split: str = "test", default=None) -> dict:
    """What moves a score, whatever is scored; pictures are drawn as `sampling` says, else `default`, else the model."""
    chosen = model._image_sampling(
        default, **{name: sampling.get(name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    )
    return {
        "checkpoint": checkpoint,
        "weights_sha256": weights_hash(BUNDLED.get(checkpoint, checkpoint)),
        "split": split,
        "seed": seed,
        "sampling": vars(chosen),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "nextflow_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def table(result: dict) -> str:
    """The scores of [`evaluate_scenes`] or [`evaluate_words`] as a Markdown table."""
    lines = ["| measure | score | 95 % interval |", "|---|---|---|"]
    for name, own in result.get("words", {}).items():
        lines.append(f"| {name} | {own['score']:.3f} | {own['low']:.3f} to {own['high']:.3f} |")
    for name, own in result.get("drawing", {}).items():
        lines.append(f"| drawing: {name} | {own['score']:.3f} | {own['low']:.3f} to {own['high']:.3f} |")
    for size, scores in result.get("drawing_at_other_sizes", {}).items():
        own = scores["overall"]
        lines.append(f"| drawing at {size}: overall | {own['score']:.3f} | {own['low']:.3f} to {own['high']:.3f} |")
    if "captions" in result:
        own = result["captions"]
        lines.append(f"| captions | {own['score']:.3f} | {own['low']:.3f} to {own['high']:.3f} |")
    for size, scores in result.get("abilities", {}).items():
        for name, own in scores.items():
            label = name if size == "words" else f"{name} ({size})"
            if isinstance(own, dict):
                lines.append(f"| {label} | {own['score']:.3f} | {own['low']:.3f} to {own['high']:.3f} |")
            else:
                lines.append(f"| {label} | {own:.3f} | |")
    if "tokenizer" in result:
        tokenizer = result["tokenizer"]
        lines.append(f"| tokenizer PSNR | {tokenizer['psnr']:.2f} dB | |")
        lines.append(f"| tokenizer, readable | {tokenizer['readable']:.3f} | |")
        for scales, own in tokenizer.get("readable_first_scales", {}).items():
            lines.append(f"| tokenizer, readable by the first {scales} scales | {own:.3f} | |")
        lines.append(f"| tokenizer codebook use | {tokenizer['codebook_use']:.1%} | |")
        lines.append(f"| referee's own error | {result['referee']['error']:.2%} | |")
    return "\n".join(lines)


def weights_hash(folder: str) -> str | None:
    """First digits of the SHA-256 of the weights of a local checkpoint, or of an adapter and the one that thinks beside
    it; `None` for what is not a folder here."""
    files = [*sorted(Path(folder).glob("*.safetensors")), *sorted(Path(folder, THINK).glob("*.safetensors"))]
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _first_scales(config: NextFlowVQConfig, size: tuple[int, int]) -> dict[str, dict]:
    """How smaller pictures are drawn that the first scales of one of `size` are, by name."""
    schedule, numbers = config.schedule, config.prefix_scales
    grids = schedule.grids_for_size(*size)
    if size[0] != size[1]:
        return {}
    return {
        "{}x{}, the first {} scales".format(*schedule.image_size(grids[own - 1]), own): {"num_scales": own}
        for own in numbers
        if own < len(grids)
    }


def _sizes(model) -> list[tuple[int, int]]:
    trained = model.config.trained_image_sizes
    return [tuple(size) for size in trained] if trained else [(min(model.config.schedule.resolutions),) * 2]


def _first_size(model) -> tuple[int, int]:
    return _sizes(model)[0]
