"""Turns finished training runs into the checkpoint that ships in the package."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from . import BUNDLED, REFINERS, NextFlowRefinerPipeline
from .evaluation import evaluate_scenes, table
from .inference import load
from .model_card import model_card, refiner_card
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .modeling.modeling_nextflow_vq import NextFlowVQModel
from .refining import load_refiner
from .training.stage_trainer import save_whole
from .training.train_decoder import processor_for

MAX_BYTES, MAX_REFINER_BYTES = 40 * 10**6, 12 * 10**6
_LOG = "training_log.json"


def bundle(runs: Path, name: str, decoder: str, **evaluation) -> dict:
    """Join decoder, tokenizer, processor, logs, scores and card in one folder.

    Args:
        runs: Folder of the runs, with the decoder's, and `vq-decoder/final` (a better pixel decoder on the same codes)
            if there is one.
        name: A name of `BUNDLED`. The checkpoint that is there is replaced only by a better drawing score. Logs of
            stages that were not run here are kept.
        decoder: Name of the run whose `final` is bundled.
        evaluation: Arguments of `evaluate_scenes`.

    Returns:
        The scores.

    Raises:
        ValueError: If the checkpoint is too large, or scores no better than the one that is there.
    """
    target = Path(BUNDLED[name])
    # 1. The decoder, with the best pixel decoder for its codes.
    model = NextFlowForConditionalGeneration.from_pretrained(runs / decoder / "final").eval()
    if (runs / "vq-decoder" / "final").is_dir():
        model.set_vq_model(NextFlowVQModel.from_pretrained(runs / "vq-decoder" / "final").eval())
    processor = processor_for(model.config, PreTrainedTokenizerFast.from_pretrained(runs / decoder / "final"))
    candidate = runs / "candidate"
    logs = json.loads((target / _LOG).read_text()) if (target / _LOG).is_file() else {}
    for path in sorted(runs.glob("*/trainer_state.json")):
        logs[path.parent.name] = json.loads(path.read_text())["log_history"]

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / _LOG).write_text(json.dumps(logs, indent=1) + "\n")
        _drop_code(folder)

    save_whole(candidate, save)
    size = sum(path.stat().st_size for path in candidate.rglob("*"))
    if size > MAX_BYTES:
        raise ValueError(f"The checkpoint has {size / 1e6:.1f} MB; {MAX_BYTES / 1e6:.0f} MB at most.")

    # 2. Its scores, from the saved files.
    result = evaluate_scenes(str(candidate), **evaluation)
    result["settings"]["checkpoint"] = name
    # Beside the candidate whether it is taken or not.
    (candidate / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    if (target / "evaluation.json").is_file():
        before = json.loads((target / "evaluation.json").read_text())["drawing"]["overall"]["score"]
        after = result["drawing"]["overall"]["score"]
        if after <= before:
            raise ValueError(f"The score {after} does not beat {before}; nothing changed.")
    loaded, _ = load(str(candidate))
    card = model_card(name, loaded, result)
    (candidate / "README.md").write_text(card.content)

    # 3. In place at once.
    target.parent.mkdir(parents=True, exist_ok=True)
    save_whole(target, lambda folder: shutil.copytree(candidate, folder, dirs_exist_ok=True))
    return result


def bundle_refiner(run: Path, name: str) -> Path:
    """Put a refiner's run into the box: its pipeline with the denoiser in half precision, its log and its card.

    Args:
        run: Folder of the run.
        name: A name of `REFINERS`.

    Returns:
        The folder.

    Raises:
        ValueError: If it is too large, or was trained on another tokenizer than the checkpoint's of that name.
    """
    target = Path(REFINERS[name])
    pipeline = NextFlowRefinerPipeline.from_pretrained(run / "final")
    load_refiner(pipeline, load(name)[0])
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    card = refiner_card(name, pipeline)

    def save(folder: Path) -> None:
        pipeline.refiner.to(torch.float16)
        pipeline.save_pretrained(folder)
        _drop_code(folder / "vq_model")
        (folder / _LOG).write_text(json.dumps({run.name: log}, indent=1) + "\n")
        (folder / "README.md").write_text(card.content)
        size = sum(path.stat().st_size for path in folder.rglob("*"))
        if size > MAX_REFINER_BYTES:
            raise ValueError(f"The refiner has {size / 1e6:.1f} MB; {MAX_REFINER_BYTES / 1e6:.0f} MB at most.")

    save_whole(target, save)
    return target


def _drop_code(folder: Path) -> None:
    """Inside the package a checkpoint needs no copy of the code beside it."""
    for module in folder.glob("*.py"):
        module.unlink()
    for name in ("config.json", "processor_config.json"):
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
    parser.add_argument("--refiner", action="store_true", help="the run is a refiner's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.refiner:
        print(bundle_refiner(args.runs / args.decoder, args.name))
        return
    print(table(bundle(args.runs, args.name, args.decoder)))


if __name__ == "__main__":
    main()
