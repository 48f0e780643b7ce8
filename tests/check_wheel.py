"""Builds the wheel and imports it in a process that knows nothing of this checkout. Run by `make wheel`."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import nextflow_hf
from nextflow_hf.in_words import add_adapter
from nextflow_hf.inference import load
from transformers import AutoConfig, AutoModelForMultimodalLM
assert {folder!r} in nextflow_hf.__file__, nextflow_hf.__file__
import nextflow_hf.modeling.scale_schedule as schedule, nextflow_hf.scenes, nextflow_hf.training.recipe as recipe
assert {folder!r} in schedule.__file__
recipe.load_recipe("mini-pretrain-64")
AutoModelForMultimodalLM.from_pretrained(nextflow_hf.MINI)
nextflow_hf.NextFlowRefinerPipeline.from_pretrained(nextflow_hf.REFINERS["mini"])
add_adapter(load("mini")[0], "mini")
"""


def main() -> None:
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # stale files there would get into the wheel
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, str(ROOT)], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        target = Path(folder) / "site"
        subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
        environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", CHECK.format(folder=folder)], cwd=folder, env=environment, check=True)
        top = {path.name for path in target.iterdir() if not path.name.endswith((".dist-info", "__pycache__"))}
        if top != {"nextflow_hf", "bin"}:
            raise SystemExit(f"The wheel puts {sorted(top)} into site-packages, not nextflow_hf alone.")
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    print("wheel: imports and loads from another directory")


if __name__ == "__main__":
    main()
