"""NextFlow as a model of lmms-eval, named "nextflow" there once this module is imported; it needs `lmms_eval`."""

from collections.abc import Sequence

from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model

from ..inference import Conversation, user
from .answering import Answering, picture_of


@register_model("nextflow")
class NextFlowLmms(lmms):
    """Answers lmms-eval's questions about pictures.

    Args:
        pretrained: "mini", a folder or a Hub id.
        device: Where the model runs; by default on the accelerator, if there is one.
        batch_size: Questions at a time.
        ignored: What lmms-eval passes to every model.
    """

    is_simple = False  # Questions come as conversations.

    def __init__(self, pretrained: str = "mini", device: str | None = None, batch_size: int | str = 1, **ignored):
        super().__init__()
        self._answering = Answering(pretrained, device)
        self._batch_size = int(batch_size)

    def generate_until(self, requests: Sequence) -> list[str]:
        """The answer to each request, cut where the task says.

        Raises:
            ValueError: If a task asks for sampled answers, or shows something else than text and pictures.
        """
        answers: dict[int, str] = {}
        lengths: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            settings = _settings(request)
            if settings.get("do_sample"):
                raise ValueError("Answers are the likeliest words; this task asks for sampled ones (`do_sample`).")
            lengths.setdefault(settings.get("max_new_tokens", 128), []).append(place)
        for length, places in lengths.items():
            for first in range(0, len(places), self._batch_size):
                chosen = places[first : first + self._batch_size]
                conversations = [self._conversation(requests[place]) for place in chosen]
                for place, answer in zip(chosen, self._answering.answer(conversations, length)):
                    answers[place] = _cut(answer, _settings(requests[place]).get("until") or [])
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation as the whole answer, and whether it is the likeliest one.

        For multiple choice and the like, whose requests hold the question's text, the continuation (or what makes it
        of the document) and what gives the document's pictures.
        """
        found = []
        for first in range(0, len(requests), self._batch_size):
            asked, answers = [], []
            for request in requests[first : first + self._batch_size]:
                text, continuation, to_pictures, number, task, split = request.args
                document = self.task_dict[task][split][number]
                asked.append([user(*map(picture_of, to_pictures(document) or ()), text)])
                answers.append((continuation(document) if callable(continuation) else continuation).strip())
            found += self._answering.score(asked, answers)
        return found

    def generate_until_multi_round(self, requests: Sequence) -> list[str]:
        """Not offered: tasks of this kind are refused by name."""
        raise NotImplementedError("NextFlow answers once here; choose tasks of the type `generate_until`.")

    def _conversation(self, request) -> Conversation:
        # Some versions put the question's text before these five.
        to_messages, _, document, task, split = request.args[-5:]
        turns = to_messages(self.task_dict[task][split][document])
        return [{"role": turn["role"], "content": [_part(own) for own in turn["content"]]} for turn in turns]


def _settings(request) -> dict:
    return request.args[-4]


def _part(own: dict) -> dict:
    if own["type"] == "text":
        return {"type": "text", "text": own["text"]}
    if own["type"] == "image":
        return {"type": "image", "image": picture_of(own["url"])}
    raise ValueError(f"NextFlow reads text and pictures, not {own['type']!r}.")


def _cut(answer: str, until: str | Sequence[str]) -> str:
    for end in [until] if isinstance(until, str) else until:
        if end:
            answer = answer.split(end)[0]
    return answer.strip()
