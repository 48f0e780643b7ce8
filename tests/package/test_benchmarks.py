"""Benchmarks that train, with next to no steps: that they still run is all that is asked here."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

SCRIPT = """
import json, sys
sys.path.insert(0, {folder!r})
import torch
import ablations
torch.set_num_threads(1)
effort = ablations.Effort(
    tokenizer_steps=3, tokenizer_batch=4, steps=2, batch=4, steps_64=1, batch_64=2, pictures=20, measured=4
)
one, two = ablations.QUESTIONS["heads"][1].values()
print(json.dumps([ablations.run(variant, 0, effort) for variant in (one, two)]))
"""


def test_a_run_of_the_ablations_measures_everything(tmp_path):
    command = [sys.executable, "-c", SCRIPT.format(folder=str(BENCHMARKS))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for measured in json.loads(done.stdout.splitlines()[-1]):
        assert {"seen", "unseen", "captions"} <= measured.keys()
        assert measured["image_loss"] > 0 and measured["text_loss"] > 0
