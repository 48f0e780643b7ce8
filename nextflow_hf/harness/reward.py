"""A judge's marks as a reward for reinforcement learning."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from ..training.rewards import last_words
from .judge import Judge, png
from .questions import read_lines

LOW, HIGH = 1, 5
QUESTION = f"""\
The picture was drawn for the request below. How well does it show what was asked for, everything and nothing else?

Request: <request>

Answer with one line: MARK: NUMBER, a whole number from {LOW} (not at all) to {HIGH} (exactly).
"""


class EndpointReward:
    """TRL reward function: marks of a model behind an OpenAI-compatible chat endpoint, mapped to [0, 1].

    Args:
        url: The endpoint's address.
        model: The model's name there.
        key_variable: Environment variable that holds the key; none is sent where it is not set.
        question: What is asked; `<request>` stands for the prompt.
        workers: Questions asked at a time.
        settings: Other arguments of [`Judge`].
    """

    __name__ = "endpoint"

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str = "OPENAI_API_KEY",
        question: str = QUESTION,
        workers: int = 4,
        **settings,
    ):
        if "<request>" not in question:
            raise ValueError("The question must hold <request>, where the prompt goes.")
        self.judge = Judge(url, model, os.environ.get(key_variable) or None, **settings)
        self.question, self.workers = question, workers

    def __call__(self, prompts: list, drawn: list[Image.Image | None], **columns) -> list[float]:
        """Marks in [0, 1]; 0 where nothing was drawn, NaN (a failure) where the judge gave no mark."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._mark, map(last_words, prompts), drawn))

    def _mark(self, text: str, picture: Image.Image | None) -> float:
        if picture is None:
            return 0.0
        asked = self.question.replace("<request>", text)
        marks = self.judge.ask("reward", "mark", asked, [png(picture)], read_lines(1, LOW, HIGH)).marks
        return math.nan if marks is None else (marks[0] - LOW) / (HIGH - LOW)
