"""The paper's RL figure in miniature (NextFlow Fig 12, VAR-RL Fig 2): rewards of GRPO on all scales and on prefixes,
with and without scale weights and VMR.

Every run starts from one checkpoint, sees the same prompts (of trained combinations), and is rewarded by the
referee; VMR draws twice as many pictures an update as the others. All draw in the same way: what differs is which codes
are trained, with what weight, and by what value. Measured: the mean reward of every update, and the strict drawing
score on validation combinations before and after.

    python benchmarks/rl.py --checkpoint FOLDER   # runs what is missing, then writes the table and the plot
    python benchmarks/rl.py --checkpoint FOLDER --only vanilla "1/4"

Every run ends in `benchmarks/results/rl.json` at once, so a killed command goes on where it was, with the same weights
wherever they lie.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from common import RESULTS, record, save_figure, table, write_json
from datasets import Dataset

from nextflow_hf import BUNDLED
from nextflow_hf.evaluation import score_drawing, weights_hash
from nextflow_hf.inference import load
from nextflow_hf.scenes import ScenePrompts, scene_reward
from nextflow_hf.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer

DOCUMENT = Path("docs/rl.md")
PLOT = Path("docs/images/rl.png")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
# Of 64 px, whose scales have 1, 2, 3, 4, 6 and 8 cells a side, a prefix of 1/2 ends with 4 x 4.
VARIANTS = {
    "vanilla": {"scale_weight_alpha": 0.0},
    "all scales, k_t": {},
    "1/8": {"prefix_scales": 1},
    "1/4": {"prefix_scales": 2},
    "1/2": {"prefix_scales": 4},
    "1/2, no k_t": {"prefix_scales": 4, "scale_weight_alpha": 0.0},
    "1/2, VMR": {"prefix_scales": 4, "vmr_completions": 2},
}


def run(settings: dict, seed: int, args: argparse.Namespace) -> dict:
    """Train once: the rewards of all updates, and the drawing score afterwards."""
    model, processor = load(args.checkpoint)
    rows = ScenePrompts(100, seed=100 + seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = NextFlowGRPOTrainer(
            model,
            scene_reward,
            args=NextFlowGRPOConfig(
                output_dir=folder,
                max_steps=args.steps,
                num_generations=8,
                per_device_train_batch_size=args.batch,
                learning_rate=args.learning_rate,
                lr_scheduler_type="constant",
                loss_type="grpo",
                temperature=args.temperature,
                top_p=0.9,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
                **settings,
            ),
            processing_class=processor,
            train_dataset=Dataset.from_list(list(rows)),
        )
        trainer.train()
    rewards = [round(own["rollout_reward"], 4) for own in trainer.state.log_history if "rollout_reward" in own]
    return {"rewards": rewards, "drawing": drawing(model.eval(), processor, args)}


def drawing(model, processor, args: argparse.Namespace) -> float:
    """The strict score on validation combinations, drawn as the checkpoint draws."""
    return score_drawing(model, processor, args.measured, 1, "validation")["overall"]["score"]


def plot(runs: dict, path: Path) -> None:
    """Mean rewards of each variant's seeds, smoothed over 5 updates, in the band of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name in VARIANTS:
        curves = [torch.tensor(own["rewards"]) for key, own in runs.items() if key.rpartition(" seed ")[0] == name]
        if not curves:
            continue
        smooth = torch.stack(curves).unfold(1, 5, 1).mean(dim=-1)
        steps = range(5, 5 + smooth.shape[1])
        (line,) = axis.plot(steps, smooth.mean(dim=0), label=name)
        axis.fill_between(steps, smooth.amin(dim=0), smooth.amax(dim=0), color=line.get_color(), alpha=0.15)
    axis.set_xlabel("updates")
    axis.set_ylabel("mean reward")
    axis.legend(fontsize=8)
    save_figure(figure, path)


def summary(result: dict) -> str:
    """A row per variant: rewards of the first and last ten updates, and the score on unseen combinations."""
    rows = []
    for name in VARIANTS:
        own = [each for key, each in result["runs"].items() if key.rpartition(" seed ")[0] == name]
        if own:
            first, last = (
                [statistics.mean(each["rewards"][part]) for each in own] for part in (slice(10), slice(-10, None))
            )
            scores = [each["drawing"] for each in own]
            rows.append(
                [name, len(own), *(f"{statistics.mean(part):.3f}" for part in (first, last, scores))]
                + [f"{min(scores):.3f} to {max(scores):.3f}"]
            )
    rows.append(["before", "", "", "", f"{result['before']:.3f}", ""])
    return table(["trained", "seeds", "reward, first 10", "reward, last 10", "drawing, unseen", "of the seeds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64, help="pictures an update")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--measured", type=int, default=50, help="prompts of each category")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS / "rl.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    effort = {name: getattr(args, name) for name in ("steps", "batch", "learning_rate", "temperature", "measured")}
    effort["weights_sha256"] = weights_hash(BUNDLED.get(args.checkpoint, args.checkpoint))
    if effort["weights_sha256"] is None:
        parser.error(f"{args.checkpoint} is no folder with weights, by which runs are told apart; download it first")
    result = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if result and result["effort"] != effort:
        parser.error(f"{args.output} holds runs of another effort, {result['effort']}; name another --output")
    own_record = record(args.threads)
    result = {"effort": effort, "runs": {}, **result, **own_record}
    if "before" not in result:
        result["before"] = drawing(*load(args.checkpoint), args)
    for seed in range(args.seeds):
        for name in args.only:
            key = f"{name} seed {seed}"
            if key not in result["runs"]:
                result["runs"][key] = {
                    **run(VARIANTS[name], seed, args),
                    "processor": own_record["machine"]["processor"],
                    "torch": torch.__version__,
                }
                write_json(args.output, result)
                print(f"{key}: {result['runs'][key]}", flush=True)
    text = summary(result)
    print(text)
    if args.output != RESULTS / "rl.json":
        return
    plot(result["runs"], PLOT)
    before, after = DOCUMENT.read_text().split(BEGIN)[0], DOCUMENT.read_text().split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
