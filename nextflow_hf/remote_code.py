"""Lets a saved checkpoint carry its own code, for use where this package is not installed."""

import json
import shutil
from pathlib import Path

from .cli import write_whole
from .modeling import configuration_nextflow
from .processing import processing_nextflow

_MODEL = "modeling_nextflow.NextFlowForConditionalGeneration"
_AUTO_MAP = {
    "AutoConfig": "configuration_nextflow.NextFlowConfig",
    "AutoModel": "modeling_nextflow.NextFlowModel",
    "AutoModelForMultimodalLM": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForCausalLM": _MODEL,
}
_PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_nextflow.NextFlowProcessor"}
_IMAGE_PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": "image_processing_pil_nextflow.NextFlowImageProcessorPil",
}


def add_remote_code(folder: str | Path) -> None:
    """Copy the modules that a checkpoint needs beside it, and name its classes in its configuration files.

    The checkpoint then loads with `trust_remote_code=True` wherever transformers and diffusers are installed. It is
    read by PIL's image processor there, which needs no torchvision.

    Args:
        folder: A checkpoint with `config.json` and `processor_config.json`.

    Raises:
        ValueError: If the folder holds no such checkpoint.
    """
    folder = Path(folder)
    for name in ("config.json", "processor_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: save the model and its processor there first.")
    for room in (configuration_nextflow, processing_nextflow):
        for module in sorted(Path(room.__file__).parent.glob("*.py")):
            if module.name != "__init__.py":
                shutil.copy(module, folder / module.name)
    _update(folder / "config.json", lambda content: content.update(auto_map=_AUTO_MAP))

    def name_processors(content):
        content["auto_map"] = _PROCESSOR_AUTO_MAP
        content["image_processor"]["auto_map"] = _IMAGE_PROCESSOR_AUTO_MAP

    _update(folder / "processor_config.json", name_processors)


def _update(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_whole(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))
