import atexit
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from fetch_suite import fetch
from PIL import Image
from skips import SKIPS

try:
    sys.path.insert(0, str(fetch()))
except subprocess.CalledProcessError as error:
    if os.environ.get("CI"):
        raise
    collect_ignore_glob = ["test_*.py"]
    print(f"transformers' common tests cannot be downloaded here and are left out: {error}", file=sys.stderr)

picture = Path(tempfile.gettempdir()) / f"nextflow-hf-test-picture-{os.getpid()}.png"
Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)).save(picture)
atexit.register(picture.unlink, missing_ok=True)
os.environ["NEXTFLOW_HF_TEST_PICTURE"] = str(picture)


def pytest_collection_modifyitems(items):
    for item in items:
        reason = SKIPS.get((item.cls.__name__ if item.cls else None, item.originalname or item.name)) or SKIPS.get(
            (None, item.originalname or item.name)
        )
        if reason and Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))
