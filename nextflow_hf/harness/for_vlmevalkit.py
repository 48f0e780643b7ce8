"""NextFlow as a model of VLMEvalKit, named "nextflow-mini" there once this module is imported; it needs `vlmeval`."""

from functools import partial

from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from ..inference import user
from .answering import Answering, picture_of


class NextFlowVLM(BaseModel):
    """Answers VLMEvalKit's questions about pictures.

    Args:
        checkpoint: "mini", a folder or a Hub id.
        device: Where the model runs; by default on the accelerator, if there is one.
        max_new_tokens: Longest answer.
    """

    INTERLEAVE = True

    def __init__(self, checkpoint: str = "mini", device: str | None = None, max_new_tokens: int = 128):
        super().__init__()
        self._answering = Answering(checkpoint, device)
        self._max_new_tokens = max_new_tokens

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """The answer to a question of texts and pictures in order."""
        parts = [own["value"] if own["type"] == "text" else picture_of(own["value"]) for own in message]
        (answer,) = self._answering.answer([[user(*parts)]], self._max_new_tokens)
        return answer.strip()


def register_checkpoint(name: str, checkpoint: str, **settings) -> None:
    """Make a checkpoint known to VLMEvalKit.

    Args:
        name: Its name there.
        checkpoint: A folder or a Hub id.
        settings: Go to [`NextFlowVLM`].
    """
    supported_VLM[name] = partial(NextFlowVLM, checkpoint=checkpoint, **settings)


register_checkpoint("nextflow-mini", "mini")
