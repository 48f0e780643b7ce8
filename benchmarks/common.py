"""What the benchmarks share: counts and clocks, a record of the machine, whole result files, and markdown tables."""

import json
import os
import platform
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).resolve().parent / "results"


def count_flops(function) -> int:
    """Floating-point operations of a call, two per multiply-add."""
    # The plain attention kernel: the counter does not know the CPU's fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def seconds(function) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def record(threads: int | None = None) -> dict:
    """Machine, versions, date and command of this run."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": {
            "processor": processor,
            "cores": os.cpu_count(),
            "threads": threads,
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def write_json(path: Path, content: dict) -> None:
    """Write a result file: under a temporary name first, so that it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_figure(figure, path: Path) -> None:
    """Write matplotlib's figure as a PNG file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    unfinished = path.with_suffix(".unfinished.png")
    figure.savefig(unfinished, dpi=90)
    unfinished.replace(path)


def table(header: list[str], rows: list[list]) -> str:
    """A markdown table; every column but the first is right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
