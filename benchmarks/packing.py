"""Packing against padding: useful tokens per second on a mix of lengths like NextFlow's (section 3.3).

Captions, pictures of three resolutions and interleaved documents train a small decoder of the 7B's schedule. Four ways
to make batches of one stream are timed on the same sequences, a bin (or a padded batch) at a time:

* padded: batches of a fixed number of sequences, each padded to its longest;
* length: bins of a fixed number of tokens;
* compute: bins of a fixed number of floating-point operations;
* time: the same, where an operation of attention has the weight at which, on other documents timed before, operations
  tell the time (`SequenceCost`'s `attention_weight`).

Ranks wait for each other at every step. So the rate with R ranks is that of R bins in turn, each step as long as its
slowest: computed from the single bins' measured times (the least of `--repeats`), no network in it.

    python benchmarks/packing.py
"""

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from common import record, write_json
from tqdm import tqdm

from nextflow_hf.memory import keep_freed_memory
from nextflow_hf.modeling.configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.training.packing import (
    Bin,
    PackedSequences,
    SequenceCost,
    attended_pairs,
    collate_packed,
    tokens_of,
)
from nextflow_hf.training.sequences import IGNORED, pad_rows, stack_images

# Shares of the documents: half short texts, the rest pictures of 256, 512 and (few) 1024 px, and stories of two.
MIX = {"text": 0.5, 256: 0.27, 512: 0.12, 1024: 0.01, "story": 0.10}


def build_config(width: int, layers: int) -> NextFlowConfig:
    """NextFlow's own schedule of 18 scales over a narrow decoder."""
    mini = NextFlowConfig.from_preset("nextflow-mini")
    vq = mini.vq_config.to_dict()
    paper = NextFlowVQConfig()
    vq.update(sides=paper.sides, levels=paper.levels, final_grids=paper.final_grids)
    text = mini.text_config.to_dict()
    text.update(hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers, layer_types=None)
    # Heads of 64, as wide as the sections of their rotary positions.
    text.update(num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128))
    return NextFlowConfig(
        **{
            name: getattr(mini, name)
            for name in ("code_start_id", "boi_token_id", "eoi_token_id", "image_token_id", "tie_word_embeddings")
        },
        text_config=text,
        vq_config=vq,
    )


def draw_sequences(
    config: NextFlowConfig,
    number: int,
    seed: int,
    mix: dict = MIX,
    tokens: tuple[int, int] = (10, 400),
) -> list[dict]:
    """A stream of random documents: texts, pictures of a side in pixels, stories of two pictures.

    Args:
        config: The decoder's configuration.
        number: How many.
        seed: Different seeds give different documents.
        mix: Share of each kind.
        tokens: Text tokens are from the first of these on, and below the second.
    """
    # A mix counts in pixels of the paper's tokenizer, whose cells are 16 wide.
    shrink = 16 // config.vq_config.downsample
    num_codes = config.vq_config.codebook_size
    rng = random.Random(seed)
    sequences = []
    for _ in range(number):
        kind = rng.choices(tuple(mix), tuple(mix.values()))[0]
        pictures = {"text": (), "story": (256, 256)}.get(kind, (kind,))
        item = {"input_ids": [], "labels": [], "codes": [], "image_labels": [], "grids": []}
        words = rng.randint(20, 120)
        _add_text(item, words, rng, tokens)
        for side in pictures:
            grids = config.schedule.grids_for_size(side // shrink, side // shrink)
            own = [rng.randrange(num_codes) for height, width in grids for _ in range(height * width)]
            slots = len(own) - 1
            item["input_ids"] += [config.boi_token_id, *[config.image_token_id] * slots, config.eoi_token_id]
            item["labels"] += [IGNORED] * (slots + 2)
            item["codes"].append(own)
            item["image_labels"].append(own)
            item["grids"].append(grids)
            _add_text(item, rng.randint(5, 60), rng, tokens)
        sequences.append(item)
    return sequences


def _add_text(item: dict, words: int, rng: random.Random, tokens: tuple[int, int]) -> None:
    own = [rng.randrange(*tokens) for _ in range(words)]
    item["input_ids"] += own
    item["labels"] += own


def collate_padded(own: Bin) -> dict[str, torch.Tensor]:
    """The usual batch: a row per sequence, padded to the longest."""
    rows = [item["input_ids"] for item in own.items]
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_rows(rows, 0)
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "labels": pad_rows([item["labels"] for item in own.items], IGNORED),
        **stack_images(own.items),
    }


def time_step(model, implementation: str, batch: dict) -> float:
    """Seconds of forward and backward."""
    model.model.language_model.set_attn_implementation(implementation)
    start = time.perf_counter()
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def measured_weight(config: NextFlowConfig, model, repeats: int) -> float:
    """What an operation of attention takes beside any other one, from documents of one kind each."""
    cost = SequenceCost(config)
    features, times = [], []
    for number, kind in ((48, "text"), (6, 256), (2, 512), (1, 1024)):
        items = draw_sequences(config, number, seed=1, mix={kind: 1.0})
        row = collate_packed([Bin(tuple(items), 0.0)])
        seconds = min(time_step(model, "block_varlen", row) for _ in range(repeats + 1))
        attention = cost.per_pair * sum(
            attended_pairs(own["input_ids"], own["grids"], config.image_token_id) for own in items
        )
        features.append([sum(map(cost, items)) - attention, attention])
        times.append(seconds)
    # Relative errors: a row of a long picture counts no more than one of captions.
    scaled = np.array(features) / np.array(times)[:, None]
    products, attention = np.linalg.lstsq(scaled, np.ones(len(times)), rcond=None)[0]
    # Where the clock says that one of them costs nothing, it is the clock that errs.
    return float(np.clip(attention / products, 0.05, 20))


def rate(bins: list[Bin], times: list[float], ranks: int) -> float:
    """Useful tokens per second and rank, when `ranks` bins run side by side and the slowest sets the pace."""
    steps = len(bins) // ranks
    seconds = sum(max(times[step * ranks : (step + 1) * ranks]) for step in range(steps))
    tokens = sum(tokens_of(item) for own in bins[: steps * ranks] for item in own.items)
    return tokens / seconds / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a padded batch")
    parser.add_argument("--tokens", type=int, default=12288, help="tokens of a fixed-length bin")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/packing.json"))
    args = parser.parse_args()
    # Else the longer the rows, the longer the C library gives memory away and takes it back, as no accelerator does.
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = build_config(args.width, args.layers)
    model = NextFlowForConditionalGeneration(config)
    sequences = draw_sequences(config, args.sequences, seed=0)
    total = sum(map(tokens_of, sequences))
    weight = measured_weight(config, model, args.repeats)
    print("weight of attention's operations", round(weight, 3), flush=True)

    def of_equal(cost):
        # As much in a bin as a fixed-length bin holds on average.
        capacity = max(sum(map(cost, sequences)) * args.tokens / total, 1.02 * max(map(cost, sequences)))
        return list(PackedSequences(sequences, capacity, cost, 4 * args.tokens, window=args.sequences))

    batches = [
        Bin(tuple(sequences[first : first + args.batch_size]), 0.0)
        for first in range(0, len(sequences), args.batch_size)
    ]
    ways = {
        "padded": ("sdpa", batches, [collate_padded(own) for own in batches]),
        "length": ("block_varlen", list(PackedSequences(sequences, args.tokens, window=args.sequences)), None),
        "compute": ("block_varlen", of_equal(SequenceCost(config)), None),
        "time": ("block_varlen", of_equal(SequenceCost(config, weight)), None),
    }
    short = [name for name, (_, bins, _) in ways.items() if len(bins) < args.ranks]
    if short:
        parser.error(f"{args.sequences} sequences fill too few bins for {args.ranks} ranks in {short}; give more")
    batches_of = {name: own[2] or [collate_packed([each]) for each in own[1]] for name, own in ways.items()}
    for name, (implementation, *_) in ways.items():
        time_step(model, implementation, batches_of[name][-1])
    # The ways take turns, so that what else the machine does slows them alike.
    turns = [
        (place / len(own), name, place, batch) for name, own in batches_of.items() for place, batch in enumerate(own)
    ]
    times_of = {name: [math.inf] * len(own) for name, own in batches_of.items()}
    for _, name, place, batch in tqdm(sorted(turns, key=lambda turn: turn[:3]) * args.repeats):
        times_of[name][place] = min(times_of[name][place], time_step(model, ways[name][0], batch))
    result = {}
    for name, (implementation, bins, _) in ways.items():
        collated, times = batches_of[name], times_of[name]
        result[name] = {
            "attention": implementation,
            "steps": len(bins),
            "tokens_per_second": round(rate(bins, times, 1), 1),
            f"tokens_per_second_of_{args.ranks}_ranks": round(rate(bins, times, args.ranks), 1),
            "padding_share": round(1 - total / sum(own["input_ids"].numel() for own in collated), 4),
            "slowest_over_mean": round(max(times) / (sum(times) / len(times)), 2),
        }
        print(name, result[name], flush=True)
    key = f"tokens_per_second_of_{args.ranks}_ranks"
    ratios = {
        name: {
            "one_rank": round(own["tokens_per_second"] / result["padded"]["tokens_per_second"], 2),
            f"{args.ranks}_ranks": round(own[key] / result["padded"][key], 2),
        }
        for name, own in result.items()
    }
    print(ratios)
    arguments = {name: str(value) for name, value in vars(args).items()}
    write_json(
        args.output,
        {
            **record(args.threads),
            "arguments": arguments,
            "attention_weight": round(weight, 3),
            "ways": result,
            "over_padded": ratios,
        },
    )


if __name__ == "__main__":
    main()
