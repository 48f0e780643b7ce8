"""A checkpoint's answers to conversations with pictures: what the adapters of understanding libraries share."""

from collections.abc import Sequence

from PIL import Image

from ..inference import Conversation, assistant, load, prepare
from ..likelihood import answer_log_probs
from ..processing.image_processing_base_nextflow import open_picture, to_rgb


class Answering:
    """Answers in the checkpoint's likeliest words.

    Args:
        checkpoint: "mini", a folder or a Hub id.
        device: Where the model runs; by default on the accelerator, if there is one.
    """

    def __init__(self, checkpoint: str, device: str | None = None):
        self._model, self._processor = load(checkpoint, device)

    def answer(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """The answer to each conversation; all are worked on at a time."""
        inputs = prepare(self._processor, conversations).to(self._model.device)
        output = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self._processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def score(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each answer, its end with it, and whether the model would give it itself."""
        ended = [[*talk, assistant(own)] for talk, own in zip(conversations, answers)]
        log_probs = answer_log_probs(self._model, self._processor, ended).tolist()
        lengths = [len(self._processor.tokenizer(own, add_special_tokens=False).input_ids) for own in answers]
        said = self.answer(conversations, max(lengths) + 1)
        return [(value, one.strip() == own) for value, one, own in zip(log_probs, said, answers)]


def picture_of(own) -> Image.Image:
    """A picture given as itself or as the path of a file.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(own, Image.Image):
        return to_rgb(own)
    if isinstance(own, str):
        return open_picture(own.removeprefix("file://"))
    raise ValueError(f"A picture or the path of one is needed, got {type(own).__name__}.")
