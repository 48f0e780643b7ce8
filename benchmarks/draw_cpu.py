"""How fast a picture is drawn on the CPU, against three yardsticks taken in the same process.

The model has random weights: the mini preset's 8-scale schedule, tokenizer and pixel decoder at 128 px, around a wider
and deeper decoder (at least 25 million parameters in its layers), in float32, with guidance. In every round these run
one after the other, so that whatever else the machine does falls on all of them alike:

* a product of two 2048 x 2048 float32 matrices: the machine's own rate, before and after each drawing;
* **cached**: `generate(generation_mode="image")`, pixel decoding included;
* **uncached**: the same with `use_cache=False`, which runs the whole sequence again for every scale;
* **one by one** (in the first `--slow-rounds` rounds): as many codes as the picture has, drawn one token per step by
  plain transformers `generate(guidance_scale=...)` from the same decoder, greedily and with its cache. Its guidance
  runs the unconditional branch as a pass of its own. It decodes no pixels, which favours it. Compared with the mean of
  a drawing before it and one after it;
* **one by one, batched**: the same without transformers' guidance but with both branches as rows of one batch, which
  plain `generate` does not offer: what a rewrite of token-by-token decoding could reach at best.

Reported, each the median over the rounds of the ratio within a round:

* wall time of uncached over cached, against the ratio of their counted FLOPs;
* wall time of one by one over cached;
* counted FLOPs per second of the cached drawing over the rate of the matrix product;
* where the time of the cached drawing goes: pass over the prompts, pass of every scale, preparing the slots, scores of
  the codes, sampling (with guidance and log-probabilities), pixel decoding. From further drawings of their own, as
  the clocks disturb.

FLOPs (two per multiply-add) are torch's `FlopCounterMode` over the real call: matrix products, attention, convolutions.

Reproduce on an idle machine: `python benchmarks/draw_cpu.py`. Writes `benchmarks/results/draw_cpu.json`, prints tables.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from common import RESULTS, count_flops, record, seconds, table, write_json
from transformers import GenerationMixin
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from nextflow_hf.modeling.configuration_nextflow import MINI_TEXT_VOCAB_SIZE, NextFlowConfig
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration

SIZE = 128
PRODUCT_SIDE = 2048
MIN_LAYER_PARAMETERS = 25_000_000
GOALS = {"uncached_wall_over_flops_ratio": 0.90, "one_by_one_over_cached": 15.0, "share_of_product_rate": 0.60}


def build_model(hidden: int, layers: int) -> NextFlowForConditionalGeneration:
    """The mini preset around a larger decoder, with random weights."""
    config = NextFlowConfig.from_preset("nextflow-mini")
    text_config = config.text_config.to_dict()
    text_config.update(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        layer_types=None,
    )
    config = NextFlowConfig.from_preset("nextflow-mini", text_config=Qwen2_5_VLTextConfig(**text_config))
    torch.manual_seed(0)
    return NextFlowForConditionalGeneration(config).eval()


class Drawing:
    """The three ways to draw, for one batch size."""

    def __init__(self, model: NextFlowForConditionalGeneration, batch: int, prompt_length: int, size: int):
        self.model, self.batch, self.size = model, batch, size
        generator = torch.Generator().manual_seed(1)
        # Ordinary text tokens: the special ones have the lowest ids.
        self.prompts = torch.randint(6, MINI_TEXT_VOCAB_SIZE, (batch, prompt_length), generator=generator)
        self.num_codes = sum(h * w for h, w in model.config.schedule.grids_for_size(size, size))

    def cached(self, **kwargs):
        return self.model.generate(
            self.prompts,
            generation_mode="image",
            image_size=(self.size, self.size),
            guidance_scale=5.0,
            seed=0,
            **kwargs,
        )

    def uncached(self):
        return self.cached(use_cache=False)

    def one_by_one(self):
        # Guidance leads away from the bare start of a picture here as well.
        start = torch.full((self.batch, 1), self.model.config.boi_token_id)
        return self._tokens(self.prompts, guidance_scale=5.0, negative_prompt_ids=start)

    def one_by_one_batched(self):
        return self._tokens(torch.cat([self.prompts, self.prompts]))

    def _tokens(self, ids: torch.Tensor, **kwargs):
        with torch.no_grad():
            out = GenerationMixin.generate(
                self.model,
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.num_codes,
                min_new_tokens=self.num_codes,
                do_sample=False,
                **kwargs,
            )
        assert out.shape[1] == ids.shape[1] + self.num_codes, out.shape
        return out


def product_seconds(left: torch.Tensor, right: torch.Tensor, times: int = 3) -> float:
    """Median over a few products."""
    return statistics.median(seconds(lambda: left @ right) for _ in range(times))


def time_split(drawing: Drawing) -> dict[str, float]:
    """Seconds of each part of one cached drawing, by clocks around the model's own steps."""
    model, spent = drawing.model, defaultdict(float)
    passes = 0
    names = ["_pass", "_block", "_code_scores", "_decode_pictures", "_draw"]

    def clocked(name, method):
        def run(*args, **kwargs):
            nonlocal passes
            start = time.perf_counter()
            result = method(*args, **kwargs)
            label = name
            if name == "_pass":
                label = "prompt pass" if passes == 0 else f"pass of scale {passes + 1}"
                passes += 1
            spent[label] += time.perf_counter() - start
            return result

        return run

    for name in names:
        setattr(model, name, clocked(name, getattr(model, name)))
    try:
        total = seconds(drawing.cached)
    finally:
        for name in names:
            delattr(model, name)
    split = {label: value for label, value in spent.items() if "pass" in label and not label.startswith("_")}
    split["preparing slots"] = spent["_block"]
    split["code scores"] = spent["_code_scores"]
    split["sampling"] = spent["_draw"] - sum(split.values())
    split["pixel decoding"] = spent["_decode_pictures"]
    split["checks"] = total - spent["_draw"] - spent["_decode_pictures"]
    split["total"] = total
    return split


def measure(drawing: Drawing, rounds: int, slow_rounds: int) -> dict:
    cached_out, uncached_out = drawing.cached(), drawing.uncached()  # warm-up, too
    same = sum(int((a == b).sum()) for a, b in zip(cached_out.codes, uncached_out.codes))
    flops = {name: count_flops(getattr(drawing, name)) for name in ("cached", "uncached")}
    left, right = torch.randn(2, PRODUCT_SIDE, PRODUCT_SIDE)
    product_seconds(left, right)
    times = defaultdict(list)
    splits, around = [], defaultdict(list)
    for index in range(rounds):
        before = product_seconds(left, right)
        times["cached"].append(seconds(drawing.cached))
        times["product"].append((before + product_seconds(left, right)) / 2)
        times["uncached"].append(seconds(drawing.uncached))
        if index < slow_rounds:
            for name in ("one_by_one", "one_by_one_batched"):
                before = seconds(drawing.cached)
                times[name].append(seconds(getattr(drawing, name)))
                # It takes long enough for the machine's load to change: one more drawing behind it.
                around[name].append((before + seconds(drawing.cached)) / 2)
        splits.append(time_split(drawing))
    product_rates = [2 * PRODUCT_SIDE**3 / spent for spent in times["product"]]
    flops_ratio = flops["uncached"] / flops["cached"]
    by_round = {
        "uncached_wall_over_flops_ratio": [u / c / flops_ratio for u, c in zip(times["uncached"], times["cached"])],
        "one_by_one_over_cached": _ratios(times, around, "one_by_one"),
        "one_by_one_batched_over_cached": _ratios(times, around, "one_by_one_batched"),
        "share_of_product_rate": [
            flops["cached"] / spent / rate for spent, rate in zip(times["cached"], product_rates)
        ],
    }
    medians = {name: statistics.median(values) for name, values in by_round.items()}
    return {
        "batch": drawing.batch,
        "codes_per_picture": drawing.num_codes,
        "same_codes_cached_and_uncached": same / (drawing.batch * drawing.num_codes),
        "flops": flops,
        "flops_ratio": flops_ratio,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "product_gflop_per_second": statistics.median(product_rates) / 1e9,
        "wall_ratio_uncached": medians["uncached_wall_over_flops_ratio"] * flops_ratio,
        "results": {
            name: {
                "median": medians[name],
                **({"goal": GOALS[name], "reached": medians[name] >= GOALS[name]} if name in GOALS else {}),
                "rounds": rounds_,
            }
            for name, rounds_ in by_round.items()
        },
        "split_seconds": {name: statistics.median(split[name] for split in splits) for name in splits[0]},
    }


def _ratios(times: dict, around: dict, name: str) -> list[float]:
    return [own / drawing for own, drawing in zip(times[name], around[name])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="pictures per call; each is measured")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--slow-rounds", type=int, default=3, help="rounds that also draw one by one")
    parser.add_argument("--hidden", type=int, default=512, help="width of the decoder, a multiple of 128")
    parser.add_argument("--layers", type=int, default=10, help="layers of the decoder")
    parser.add_argument("--prompt-length", type=int, default=32, help="text tokens before <boi>")
    parser.add_argument("--output", type=Path, default=RESULTS / "draw_cpu.json", help="where the JSON goes")
    args = parser.parse_args()
    if args.rounds < 1 or not 1 <= args.slow_rounds <= args.rounds:
        parser.error("need --rounds >= --slow-rounds >= 1")

    torch.set_num_threads(args.threads)
    model = build_model(args.hidden, args.layers)
    layer_parameters = sum(p.numel() for p in model.model.language_model.layers.parameters())
    if layer_parameters < MIN_LAYER_PARAMETERS:
        parser.error(f"the decoder's layers have {layer_parameters:,} parameters, fewer than {MIN_LAYER_PARAMETERS:,}")
    about = record(args.threads)
    measured = [
        measure(Drawing(model, batch, args.prompt_length, SIZE), args.rounds, args.slow_rounds) for batch in args.batch
    ]
    write_json(
        args.output,
        {
            "what": f"drawing {SIZE} px on the CPU: float32, guidance, random weights",
            **about,
            "prompt_length": args.prompt_length,
            "layer_parameters": layer_parameters,
            "pixel_decoder_parameters": sum(p.numel() for p in model.vq_model.pixel_decoder.parameters()),
            "batches": measured,
        },
    )

    rows = []
    for result in measured:
        spent, own = result["seconds"], result["results"]
        rows.append(
            [
                result["batch"],
                f"{spent['cached']:.2f}",
                f"{spent['uncached']:.2f}",
                f"{spent['one_by_one']:.2f}",
                f"{result['wall_ratio_uncached']:.2f} of {result['flops_ratio']:.2f}",
                f"{own['uncached_wall_over_flops_ratio']['median']:.0%}",
                f"{own['one_by_one_over_cached']['median']:.1f}",
                f"{own['one_by_one_batched_over_cached']['median']:.1f}",
                f"{result['flops']['cached'] / 1e9:.1f}",
                f"{own['share_of_product_rate']['median']:.0%}",
            ]
        )
    header = ["batch", "cached s", "uncached s", "one by one s", "uncached / cached: wall of FLOPs", "share"]
    print(table([*header, "one by one / cached", "batched", "GFLOP", "of product rate"], rows))
    print()
    names = list(measured[0]["split_seconds"])
    cells = [[name, *(f"{1000 * m['split_seconds'][name]:.1f}" for m in measured)] for name in names]
    print(table(["part of a cached drawing", *(f"ms, batch {m['batch']}" for m in measured)], cells))


if __name__ == "__main__":
    main()
