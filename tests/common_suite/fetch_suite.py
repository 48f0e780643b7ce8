"""Fetches transformers' own common tests: they are in the source distribution of a release, not in its wheel.

The suite is unpacked outside this repository and never committed. The distribution lacks a few modules that its files
import; small stand-ins of ours take their place. `python tests/common_suite/fetch_suite.py` fetches it now.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

CACHE = Path(os.environ.get("NEXTFLOW_HF_CACHE", Path.home() / ".cache" / "nextflow-hf"))

# Pictures come from a local file instead of a URL.
_LOCAL_PICTURE = """\
import os


def url_to_local_path(url):
    return os.environ["NEXTFLOW_HF_TEST_PICTURE"]
"""
# What the distribution's tests import and the distribution lacks.
STAND_INS = {
    "hf_suite/__init__.py": "",
    "hf_suite/utils/__init__.py": "",
    "hf_suite/utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False}\n",
    "hf_suite/utils/tiny_model_summary.json": "{}",
    "hf_suite/exporters/__init__.py": "",
    "hf_suite/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "hf_suite/generation/__init__.py": "",
    "hf_suite/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/fetch_hub_objects_for_ci.py": _LOCAL_PICTURE,
    "tests/utils/tiny_model_summary.json": "{}",
}


def fetch() -> Path:
    """Folder that holds the package `hf_suite`, downloaded on the first call.

    Raises:
        subprocess.CalledProcessError: If the distribution cannot be downloaded.
    """
    folder = CACHE / f"transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        root = Path(temporary)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", f"transformers=={transformers.__version__}", "--dest", str(root)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        (archive,) = root.glob("*.tar.gz")
        with tarfile.open(archive) as content:
            content.extractall(root, filter="data")
        unfinished = root / "suite"
        shutil.copytree(next(root.glob("transformers-*/tests")), unfinished / "hf_suite")
        for name, text in STAND_INS.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        # The pipeline tests read the installed package by the repository's path.
        (unfinished / "src").mkdir()
        (unfinished / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
        (unfinished / "origin.json").write_text(json.dumps({"archive": archive.name}))
        try:
            os.replace(unfinished, folder)
        except OSError:
            # Another process of the same test run was faster.
            if not folder.is_dir():
                raise
    return folder


if __name__ == "__main__":
    print(fetch())
