"""NextFlow (arXiv 2601.02204) for Hugging Face: one transformer that reads, writes and draws.

Importing the package registers its classes with transformers' Auto classes and pipelines.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a bare checkout the sub-packages lie beside this folder, not in it (see `package_dir` in setup.cfg).
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file():
    __path__.append(str(_root))

from .registration import register

_checkpoints = Path(__file__).resolve().parent / "checkpoints"
MINI = str(_checkpoints / "nextflow-mini")
"""Folder of the bundled checkpoint, for every `from_pretrained`."""
MINI_WORDS = str(_checkpoints / "nextflow-mini-words")
"""Folder of the bundled checkpoint that draws words and nothing else."""
MINI_128 = str(_checkpoints / "nextflow-mini-128")
"""Folder of the bundled checkpoint that draws scenes of 128 pixels, and describes them."""
BUNDLED = {"mini": MINI, "mini-words": MINI_WORDS, "mini-128": MINI_128}
REFINERS = {"mini": str(_checkpoints / "nextflow-mini-refiner")}
"""Bundled refiners of what the bundled checkpoints draw."""
ADAPTERS = {"mini": str(_checkpoints / "nextflow-mini-look")}
"""Bundled adapters with which bundled checkpoints look and think in words. No models of their own: an adapter is added
to the loaded checkpoint by `nextflow_hf.in_words.add_adapter(model, "mini")`, not by `from_pretrained`."""

_EXPORTS = {
    "NextFlowConfig": "modeling.configuration_nextflow",
    "NextFlowVQConfig": "modeling.configuration_nextflow",
    "ScaleSchedule": "modeling.scale_schedule",
    "NextFlowVQModel": "modeling.modeling_nextflow_vq",
    "NextFlowModel": "modeling.modeling_nextflow",
    "NextFlowForConditionalGeneration": "modeling.modeling_nextflow",
    "ScaleStreamer": "modeling.generation_nextflow",
    "NextFlowRefinerModel": "modeling.modeling_refiner",
    "NextFlowRefinerPipeline": "modeling.pipeline_refiner",
    "TokenFlowConfig": "modeling.configuration_tokenflow",
    "TokenFlowForImageGeneration": "modeling.modeling_tokenflow",
    "TokenFlowModel": "modeling.modeling_tokenflow",
    "TokenFlowProcessor": "processing.processing_tokenflow",
    "NextFlowProcessor": "processing.processing_nextflow",
    "NextFlowImageProcessor": "processing.image_processing_nextflow",
    "NextFlowImageProcessorPil": "processing.image_processing_pil_nextflow",
}
__all__ = ["ADAPTERS", "BUNDLED", "MINI", "MINI_128", "MINI_WORDS", "REFINERS", "register", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
