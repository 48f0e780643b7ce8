"""Turns finished training runs into the checkpoint that ships in the package."""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from . import ADAPTERS, BUNDLED, REFINERS, NextFlowRefinerPipeline
from .evaluation import evaluate_in_words, evaluate_scenes, evaluate_words, table
from .in_words import THINK
from .inference import load
from .model_card import adapter_card, model_card, refiner_card, words_card
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .modeling.modeling_nextflow_vq import NextFlowVQModel
from .refining import load_refiner
from .training.stage_trainer import save_whole
from .training.train_decoder import processor_for

MAX_BYTES, MAX_REFINER_BYTES, MAX_ADAPTER_BYTES = 40 * 10**6, 12 * 10**6, 24 * 10**6
# What drawing may lose where other scores rise.
MAX_DRAWING_LOSS = 0.02
_LOG = "training_log.json"


@dataclass(frozen=True)
class _Bundle:
    """What belongs to a bundled checkpoint: its stages, whose logs go with it, its scores and its card."""

    stages: tuple[str, ...]
    evaluate: Callable[..., dict]
    card: Callable[..., ModelCard]


_BUNDLES = {
    "mini": _Bundle(
        ("teacher", "vq-pixel", "vq-joint", "vq-decoder", "vq-small", "pretrain-64", "grpo"),
        evaluate_scenes,
        model_card,
    ),
    "mini-128": _Bundle(("vq-128", "pretrain-128"), evaluate_scenes, model_card),
    "mini-words": _Bundle(("vq-words", "pretrain-words", "grpo-words"), evaluate_words, words_card),
}


def bundle(runs: Path, name: str, decoder: str, vq: str | None = None, **evaluation) -> dict:
    """Join decoder, tokenizer, processor, logs, scores and card in one folder.

    Args:
        runs: Folder of the runs.
        name: A name of `BUNDLED`. The checkpoint that is there is replaced only by a better one ([`check_better`]).
            Logs of stages that were not run here are kept.
        decoder: Name of the run whose `final` is bundled.
        vq: Name of a run with a better pixel decoder for the same codes.
        evaluation: Arguments of `evaluate_scenes`, or of `evaluate_words`.

    Returns:
        The scores.

    Raises:
        ValueError: If the checkpoint is too large, or scores no better than the one that is there.
    """
    target, own = Path(BUNDLED[name]), _BUNDLES[name]
    # 1. The decoder, with the best pixel decoder for its codes.
    model = NextFlowForConditionalGeneration.from_pretrained(runs / decoder / "final").eval()
    if vq is not None:
        model.set_vq_model(NextFlowVQModel.from_pretrained(runs / vq / "final").eval())
    processor = processor_for(model.config, PreTrainedTokenizerFast.from_pretrained(runs / decoder / "final"))
    candidate = runs / "candidate"
    logs = json.loads((target / _LOG).read_text()) if (target / _LOG).is_file() else {}
    for path in (runs / stage / "trainer_state.json" for stage in own.stages):
        if path.is_file():
            logs[path.parent.name] = json.loads(path.read_text())["log_history"]

    def save(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=_halves(model))
        processor.save_pretrained(folder)
        (folder / _LOG).write_text(json.dumps(logs, indent=1) + "\n")
        _drop_code(folder)

    save_whole(candidate, save)
    size = sum(path.stat().st_size for path in candidate.rglob("*"))
    if size > MAX_BYTES:
        raise ValueError(f"The checkpoint has {size / 1e6:.1f} MB; {MAX_BYTES / 1e6:.0f} MB at most.")

    # 2. Its scores, from the saved files.
    result = own.evaluate(str(candidate), **evaluation)
    result["settings"]["checkpoint"] = name
    # Beside the candidate whether it is taken or not.
    (candidate / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    if (target / "evaluation.json").is_file():
        check_better(json.loads((target / "evaluation.json").read_text()), result)
    loaded, _ = load(str(candidate))
    card = own.card(name, loaded, result)
    (candidate / "README.md").write_text(card.content)

    # 3. In place at once.
    target.parent.mkdir(parents=True, exist_ok=True)
    save_whole(target, lambda folder: shutil.copytree(candidate, folder, dirs_exist_ok=True))
    return result


def check_better(before: dict, after: dict) -> None:
    """Whether a checkpoint may take another's place: its mean score is higher, and drawing scenes not lost to the rest.

    Args:
        before: Scores of the checkpoint that is there, as [`evaluate_scenes`] or [`evaluate_words`] returns them.
        after: Scores of the other; what only one of the two was measured in counts as 0 for the other.

    Raises:
        ValueError: If it may not.
    """
    old, new = scores_of(before), scores_of(after)
    names = sorted({*old, *new})
    means = [sum(own.get(name, 0.0) for name in names) / len(names) for own in (old, new)]
    lost = old.get("drawing", 0.0) - new.get("drawing", 0.0)
    if means[1] <= means[0] or lost > MAX_DRAWING_LOSS:
        changes = [f"{name} {old.get(name, 0.0):.3f} to {new.get(name, 0.0):.3f}" for name in names]
        raise ValueError(
            f"The scores' mean goes from {means[0]:.4f} to {means[1]:.4f} and drawing loses {lost:.3f} (at most "
            f"{MAX_DRAWING_LOSS}); nothing changed. {', '.join(changes)}."
        )


def scores_of(result: dict) -> dict[str, float]:
    """One number for each measure: drawing at every size, captions, every ability; not those of single kinds."""
    found = {name: own["score"] for name, own in result.get("words", {}).items()}
    if "drawing" in result:
        found["drawing"] = result["drawing"]["overall"]["score"]
    for size, own in result.get("drawing_at_other_sizes", {}).items():
        found[f"drawing at {size}"] = own["overall"]["score"]
    if "captions" in result:
        found["captions"] = result["captions"]["score"]
    for group, scores in result.get("abilities", {}).items():
        for name, own in scores.items():
            if isinstance(own, dict) and not name.startswith("questions:"):
                found[f"{name} ({group})"] = own["score"]
    return found


def bundle_refiner(run: Path, name: str) -> Path:
    """Put a refiner's run into the box: its pipeline with the denoiser in half precision, its log and its card.

    Args:
        run: Folder of the run.
        name: A name of `REFINERS`.

    Returns:
        The folder.

    Raises:
        ValueError: If it is too large, was trained on another tokenizer than the checkpoint's of that name, or that
            checkpoint has no refiner in the box.
    """
    target = _place_of(name, REFINERS, "refiner")
    pipeline = NextFlowRefinerPipeline.from_pretrained(run / "final")
    load_refiner(pipeline, load(name)[0])
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    card = refiner_card(name, pipeline)

    def save(folder: Path) -> None:
        pipeline.refiner.to(torch.float16)
        pipeline.save_pretrained(folder)
        pipeline.vq_model.save_pretrained(folder / "vq_model", state_dict=_halves(pipeline.vq_model))
        _drop_code(folder / "vq_model")
        (folder / _LOG).write_text(json.dumps({run.name: log}, indent=1) + "\n")
        (folder / "README.md").write_text(card.content)
        size = sum(path.stat().st_size for path in folder.rglob("*"))
        if size > MAX_REFINER_BYTES:
            raise ValueError(f"The refiner has {size / 1e6:.1f} MB; {MAX_REFINER_BYTES / 1e6:.0f} MB at most.")

    save_whole(target, save)
    return target


def bundle_adapter(run: Path, name: str, thinks: Path | None = None, **evaluation) -> dict:
    """Put an adapter's run into the box: its weights in half precision, its log, its scores and its card.

    Args:
        run: Folder of the run.
        name: A name of `ADAPTERS`: the checkpoint that it was trained for. What is there is replaced only by a better
            one ([`check_better`]).
        thinks: Folder of the run of a second one for thinking in words ([`in_words.add_adapter`]).
        evaluation: Arguments of `evaluate_in_words`.

    Returns:
        The scores.

    Raises:
        ValueError: If they are too large, hold numbers that half precision does not, score no better than what is
            there, or the checkpoint of that name has no adapter in the box.
    """
    target, candidate = _place_of(name, ADAPTERS, "adapter"), run / "candidate"
    runs = [own for own in (run, thinks) if own is not None]
    logs = {own.name: json.loads((own / "trainer_state.json").read_text())["log_history"] for own in runs}

    def save(folder: Path) -> None:
        for own, place in zip(runs, (folder, folder / THINK)):
            _save_adapter(own / "adapter", place, f"nextflow-{name}")
        (folder / _LOG).write_text(json.dumps(logs, indent=1) + "\n")
        size = sum(path.stat().st_size for path in folder.rglob("*"))
        if size > MAX_ADAPTER_BYTES:
            raise ValueError(f"The adapter has {size / 1e6:.1f} MB; {MAX_ADAPTER_BYTES / 1e6:.0f} MB at most.")

    save_whole(candidate, save)
    result = evaluate_in_words(name, adapter=str(candidate), **evaluation)
    (candidate / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    if (target / "evaluation.json").is_file():
        check_better(json.loads((target / "evaluation.json").read_text()), result)
    ranks = [json.loads((own / "adapter" / "adapter_config.json").read_text())["r"] for own in runs]
    (candidate / "README.md").write_text(adapter_card(name, ranks, result).content)
    save_whole(target, lambda folder: shutil.copytree(candidate, folder, dirs_exist_ok=True))
    return result


def _save_adapter(adapter: Path, folder: Path, base: str) -> None:
    """An adapter as it lies in the box, where its base is the checkpoint of a name."""
    folder.mkdir(exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    weights = load_file(adapter / "adapter_model.safetensors")
    halves = {key: _half(key, own).contiguous() for key, own in weights.items()}
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(adapter / "generation_config.json", folder)


def _place_of(name: str, places: dict[str, str], kind: str) -> Path:
    """Where the box has what belongs to a checkpoint."""
    if name not in places:
        raise ValueError(f"The box has a place for the {kind} of {sorted(places)}, not of {name!r}.")
    return Path(places[name])


def _halves(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights in half precision, as they lie on the disk; the configuration's dtype is that in which they load.

    Codes stay as they are: a decoder knows its codebook by them. Weights that are shared stay shared.
    """
    halves: dict[tuple, torch.Tensor] = {}
    state = model.state_dict()
    for name, own in state.items():
        if own.is_floating_point() and ".codebook." not in f".{name}":
            state[name] = halves.setdefault((own.data_ptr(), own.shape), _half(name, own))
    return state


def _half(name: str, weight: torch.Tensor) -> torch.Tensor:
    half = weight.half()
    if not torch.isfinite(half).all():
        raise ValueError(f"{name} holds numbers that half precision does not.")
    return half


def _drop_code(folder: Path) -> None:
    """Inside the package a checkpoint needs no copy of the code beside it."""
    for module in folder.glob("*.py"):
        module.unlink()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text())
        content.pop("auto_map", None)
        content.get("image_processor", {}).pop("auto_map", None)
        content.get("vq_config", {}).pop("auto_map", None)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """`python -m nextflow_hf.bundle RUNS NAME RUN`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("name", choices=BUNDLED)
    parser.add_argument("decoder", help="name of the run")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--vq", help="name of a run with a better pixel decoder for the same codes")
    kind.add_argument("--refiner", action="store_true", help="the run is a refiner's")
    kind.add_argument("--adapter", action="store_true", help="the run is an adapter's")
    parser.add_argument("--thinks", help="with --adapter: name of the run of a second adapter, for thinking in words")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.thinks is not None and not args.adapter:
        parser.error("--thinks goes with --adapter")
    if args.refiner:
        print(bundle_refiner(args.runs / args.decoder, args.name))
        return
    if args.adapter:
        thinks = None if args.thinks is None else args.runs / args.thinks
        print(table(bundle_adapter(args.runs / args.decoder, args.name, thinks)))
        return
    print(table(bundle(args.runs, args.name, args.decoder, args.vq)))


if __name__ == "__main__":
    main()
