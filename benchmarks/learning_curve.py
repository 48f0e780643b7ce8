"""How the scores of a training run grow with its compute: its checkpoints, scored one after the other.

Each checkpoint's average of the weights is scored on validation combinations (never on those of the test split, so that
the figure may guide training). Compute is what `Trainer` counted: six floating-point operations per parameter and
token. Runs are given in the order in which one went on from the other; their compute adds up. Between two ends of a
learning rate schedule scores are lower than they would be at an end.

Keep the checkpoints of a run with `nextflow-hf train RECIPE trainer.save_total_limit=100`, then

    python benchmarks/learning_curve.py runs/mini/pretrain-64 --every 500

writes `benchmarks/results/learning_curve.json` (a killed run goes on), the table and figure in `docs/abilities.md`.
"""

import argparse
import json
from pathlib import Path

import torch
from common import RESULTS, record, save_figure, table, write_json
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedTokenizerFast

from nextflow_hf import abilities
from nextflow_hf.evaluation import score_captions, score_drawing
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.training.recipe import load_recipe
from nextflow_hf.training.train_decoder import processor_for

SIZE = (64, 64)
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "abilities.md"
BEGIN, END = "<!-- learning curve: begin -->", "<!-- learning curve: end -->"
MEASURES = {
    "drawing": "drawing: overall",
    "captions": "captions",
    "questions": "questions",
    "comparison": "comparison",
    "edits followed": "edits: followed",
    "edits exact": "edits: exact",
    "stories as told": "stories: frames as told",
}


def load_checkpoint(folder: Path, recipe) -> tuple[NextFlowForConditionalGeneration, object]:
    """A checkpoint of a run with its average of the weights, and its processor."""
    model = NextFlowForConditionalGeneration.from_pretrained(folder).eval()
    model.load_state_dict(load_file(folder / "ema.safetensors"), strict=False)
    model.config.abilities, model.config.trained_image_sizes = None, [list(SIZE)]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.init_from["tokenizer"])
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
        **{f"image_{name}": value for name, value in recipe.stage_args["sampling"].items()},
    )
    return model, processor_for(model.config, tokenizer)


def score(model, processor, tests: int) -> dict[str, float]:
    """Scores by measure, on validation combinations."""
    tested = abilities.Tested(model, processor, SIZE, tests, 0, "validation")
    found = {
        "drawing: overall": score_drawing(model, processor, tests // 2, 1, "validation")["overall"],
        "captions": score_captions(model, processor, tests, "validation"),
        **abilities.score_questions(tested),
        **abilities.score_comparison(tested),
        **abilities.score_edits(tested),
        **abilities.score_stories(tested),
    }
    return {name: found[key]["score"] for name, key in MEASURES.items()}


def draw_figure(points: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for name in MEASURES:
        axis.plot([own["pflop"] for own in points], [own["scores"][name] for own in points], "o-", label=name)
    for own in points:
        if own["end"]:
            axis.axvline(own["pflop"], color="tab:gray", linewidth=0.5)
    axis.set_xlabel("training compute on all tasks, 10^15 FLOP")
    axis.set_ylabel("score on validation combinations")
    axis.set_ylim(0, 1)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of the runs, in order; their names are recipes'")
    parser.add_argument("--every", type=int, default=500, help="steps between the checkpoints that are scored")
    parser.add_argument("--tests", type=int, default=60)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=RESULTS / "learning_curve.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    done = json.loads(args.output.read_text())["points"] if args.output.is_file() else []
    points, before = [], 0.0
    for run in args.runs:
        recipe = load_recipe(f"mini-{run.name}")
        last = recipe.trainer["max_steps"]
        steps = [*range(args.every, last, args.every), last]
        for step in steps:
            folder = run / f"checkpoint-{step}"
            if not (folder / "ema.safetensors").is_file():
                continue
            state = json.loads((folder / "trainer_state.json").read_text())
            own = {"run": run.name, "step": step, "tests": args.tests, "end": step == last}
            own["pflop"] = round(before + state["total_flos"] / 1e15, 4)
            known = next((point for point in done if {**own, "scores": point["scores"]} == point), None)
            points.append(known or {**own, "scores": score(*load_checkpoint(folder, recipe), args.tests)})
            write_json(args.output, {**record(args.threads), "points": points})
        before = points[-1]["pflop"]
    path = DOCUMENT.parent / "images" / "learning_curve.png"
    draw_figure(points, path)
    header = ["steps on all tasks", "10^15 FLOP", *MEASURES]
    rows, steps_before = [], 0
    for own in points:
        values = [f"{own['scores'][name]:.2f}" for name in MEASURES]
        rows.append([f"{steps_before + own['step']}{' (end)' if own['end'] else ''}", f"{own['pflop']:.2f}", *values])
        steps_before += own["step"] if own["end"] else 0
    text = DOCUMENT.read_text()
    figure = f"![Scores against training compute](images/{path.name})"
    body = f"{BEGIN}\n{table(header, rows)}\n\n{figure}\n{END}"
    DOCUMENT.write_text(text[: text.index(BEGIN)] + body + text[text.index(END) + len(END) :])
    print(table(header, rows))


if __name__ == "__main__":
    main()
