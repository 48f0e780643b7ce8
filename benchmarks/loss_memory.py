"""Peak memory of the head's loss at the 7B's vocabulary and one 1024 px image, beyond what must be there anyway.

The hidden states, the head's weight and the gradients of both are counted out; what is left is what the loss itself
adds. On the CPU, by the process's peak resident memory, every way in a process of its own: in float32, and under
bfloat16 autocast with float32 weights as the recipes train.

    python benchmarks/loss_memory.py
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, record, table, write_json
from torch import nn

from nextflow_hf.modeling.chunked_cross_entropy import chunked_cross_entropy

WAYS = ("chunked", "chunked, autocast", "plain")


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, rows: int, width: int, vocabulary: int) -> dict:
    """Bytes that forward and backward add, and their seconds."""
    head = nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(rows, width, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,))
    # As in training: the mean over text and the mean over codes, which pass the head together.
    sizes = [rows // 10, rows - rows // 10]
    weights = torch.cat([torch.full((own,), 1 / own) for own in sizes])
    # What must be there anyway: touched now, so that it is resident before the baseline is read.
    gradients = [torch.ones_like(head.weight), torch.ones_like(hidden)]
    before = peak_bytes()
    del gradients
    start = time.perf_counter()
    if way == "plain":
        losses = F.cross_entropy(head(hidden), labels, reduction="none")
        loss = sum(own.mean() for own in losses.split(sizes))
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "chunked, autocast"):
            means, _ = chunked_cross_entropy(head, hidden, labels, weights, sizes)
        loss = sum(means)
    loss.backward()
    return {"added_bytes": peak_bytes() - before, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10084)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--vocabulary", type=int, default=152064 + 32768)
    parser.add_argument("--plain-rows", type=int, default=1000, help="rows of the plain loss, which needs far more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "loss_memory.json")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.way is not None:
        print(json.dumps(measure(args.way, args.rows, args.width, args.vocabulary)))
        return
    results = {}
    for way in WAYS:
        rows = args.plain_rows if way == "plain" else args.rows
        command = [sys.executable, __file__, "--way", way, "--rows", str(rows), "--width", str(args.width)]
        command += ["--vocabulary", str(args.vocabulary), "--threads", str(args.threads)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[way] = {"rows": rows, **json.loads(out.splitlines()[-1])}
    print(
        table(
            ["loss", "rows", "added MiB", "seconds"],
            [[way, own["rows"], round(own["added_bytes"] / 2**20), own["seconds"]] for way, own in results.items()],
        )
    )
    shape = {"width": args.width, "vocabulary": args.vocabulary}
    write_json(args.output, {**record(args.threads), "shape": shape, "results": results})


if __name__ == "__main__":
    main()
