"""Rewards for drawing scenes, as TRL's reward functions: the referee's and the reader's verdicts."""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image

from ..training.rewards import last_words, ocr_score
from .captions import Facts, describe, facts_match, parse, tell_all
from .edits import draw_edit
from .prompts import make_prompts
from .questions import Question, ask
from .referee import Reading, Referee
from .sampling import CATEGORIES, FAMILIES, sample_scene
from .signs import SignReader, ask_freely, draw_sign, words_of_sign
from .source import QUESTION
from .world import Scene, lattice_for, render


class _Rows:
    """A list of rows, as `datasets.Dataset.from_list` and a recipe's source take it."""

    rows: list[dict]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]

    def __iter__(self):
        return iter(self.rows)


class ScenePrompts(_Rows):
    """Prompts of all categories, for reinforcement learning: rows of `id` and `prompt`.

    Args:
        per_category: Prompts of each category.
        split: Their combinations; those of "test" are what a checkpoint is measured by.
        seed: Different seeds give different prompts.
        categories: Of which; all by default.
    """

    def __init__(
        self,
        per_category: int = 200,
        split: str = "train",
        seed: int = 0,
        categories: tuple[str, ...] = CATEGORIES,
    ):
        self.rows = [
            {"id": f"{category} {index}", "prompt": [{"role": "user", "content": own.text}]}
            for category in categories
            for index, own in enumerate(make_prompts(category, per_category, split, seed))
        ]


class EditPrompts(_Rows):
    """Pictures to edit, for reinforcement learning: rows of `id`, `prompt`, `images`, and `wanted`, the changed scene
    in words that leave nothing out.

    Args:
        number: How many.
        split: Their combinations, before and after.
        seed: Different seeds give different edits.
        size: (height, width) in pixels.
        families: Shares of the kinds of scenes; see `sample_scene`.
    """

    def __init__(
        self,
        number: int = 1000,
        split: str = "train",
        seed: int = 0,
        size: tuple[int, int] = (64, 64),
        families: tuple[float, ...] = FAMILIES,
    ):
        rng = np.random.default_rng(seed)
        self.rows = []
        while len(self.rows) < number:
            scene = sample_scene(rng, split, lattice_for(size), "placed", families)
            own = draw_edit(scene, rng, trained=split == "train")
            if own is not None:
                self.rows.append(_row(f"edit {len(self.rows)}", own.before, size, own.text, tell_all(own.after)))


class AnswerPrompts(_Rows):
    """Questions about pictures, for reinforcement learning: rows of `id`, `prompt`, `images`, and `wanted`, the answer.

    Args:
        number: How many.
        split: The pictures' combinations.
        seed: Different seeds give different pictures.
        size: (height, width) in pixels.
        families: Shares of the kinds of scenes; see `sample_scene`.
        describes: Share of the questions that ask for a description.
    """

    def __init__(
        self,
        number: int = 1000,
        split: str = "train",
        seed: int = 0,
        size: tuple[int, int] = (64, 64),
        families: tuple[float, ...] = FAMILIES,
        describes: float = 0.5,
    ):
        rng = np.random.default_rng(seed)
        self.rows = []
        while len(self.rows) < number:
            arrangement = ("orderly", "placed")[len(self.rows) % 2]
            scene = sample_scene(rng, split, lattice_for(size), arrangement, families)
            own = Question("description", QUESTION, describe(scene)) if rng.random() < describes else ask(scene, rng)
            if own is not None:
                self.rows.append(_row(f"{own.kind} {len(self.rows)}", scene, size, own.text, own.answer))


def _row(name: str, shown: Scene, size: tuple[int, int], text: str, wanted: str) -> dict:
    """A prompt about a picture, and what is wanted of the answer."""
    return {
        "id": name,
        "prompt": [{"role": "user", "content": text}],
        "images": [Image.fromarray(render(shown, size))],
        "wanted": wanted,
    }


class WordPrompts(_Rows):
    """Prompts for a word in a picture, for reinforcement learning: rows of `id`, `prompt` and `words`.

    Args:
        number: How many.
        split: "train" writes strings of letters and numbers; see `draw_sign`.
        seed: Different seeds give different words.
        free_share: Share of prompts in ways to ask that training did not have ([`ask_freely`]).
    """

    def __init__(self, number: int = 1000, split: str = "train", seed: int = 0, free_share: float = 0.0):
        rng = np.random.default_rng(seed)
        signs = [draw_sign(rng, split, document_share=0.0) for _ in range(number)]
        self.rows = [
            {"id": f"word {index}", "prompt": [{"role": "user", "content": prompt}], "words": own.text}
            for index, own in enumerate(signs)
            for prompt in [ask_freely(own, rng) if rng.random() < free_share else words_of_sign(own, rng)]
        ]


def scene_reward(prompts: list, drawn: list, wanted: list[str] | None = None, **columns) -> list[float | None]:
    """How far each picture shows what its prompt asks for (or the column `wanted`, where prompts are riddles): 1 if
    exactly, else at most 1/2; 0 where nothing was drawn.

    Half of it is strict, as the score is (exactly the objects asked for, and nothing else); the other half is the F1 of
    objects that fit the prompt, so that a picture nearly right is worth more than one all wrong. `None` for prompts
    that are no caption of this world.
    """
    texts = map(last_words, prompts) if wanted is None else wanted
    return [_scene_reward(text, picture) for text, picture in zip(texts, drawn)]


class SceneReward:
    """[`scene_reward`] by several processes: an accelerator draws faster than one referee looks.

    They are started when the first pictures come; a script that uses it needs `if __name__ == "__main__":`, as all that
    start processes do.

    Args:
        processes: How many; by default this training process' share of the cores. 1 starts none.
    """

    __name__ = "scene_reward"

    def __init__(self, processes: int | None = None):
        self.processes = _share_of_cores() if processes is None else processes
        self.pool: ProcessPoolExecutor | None = None

    def __call__(self, prompts: list, drawn: list, wanted: list[str] | None = None, **columns) -> list[float | None]:
        """See [`scene_reward`]."""
        if self.processes <= 1:
            return scene_reward(prompts, drawn, wanted)
        if self.pool is None:
            # Started anew, not forked: a copy of a process that uses an accelerator may hang.
            self.pool = ProcessPoolExecutor(self.processes, get_context("spawn"), torch.set_num_threads, (1,))
        texts = list(map(last_words, prompts) if wanted is None else wanted)
        return list(self.pool.map(_scene_reward, texts, drawn, chunksize=4))


def _share_of_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _scene_reward(text: str, picture: Image.Image | None) -> float | None:
    facts = parse(text)
    if facts is None or picture is None:
        return None if facts is None else 0.0
    reading = _referee(lattice_for(picture.size[::-1])).look(picture)
    passed = reading.readable and facts_match(facts, reading)
    return 0.5 * passed + 0.5 * objects_f1(facts, reading)


@lru_cache
def _referee(lattice: tuple[int, int]) -> Referee:
    return Referee(lattice)


def answer_reward(prompts: list, completions: list, wanted: list[str], **columns) -> list[float]:
    """1 for an answer that is the wanted one to the letter, else 0."""
    said = (own if isinstance(own, str) else own[-1]["content"] for own in completions)
    return [float(text.strip() == answer) for text, answer in zip(said, wanted)]


def objects_f1(facts: Facts, reading: Reading) -> float:
    """F1 between the objects asked for and those seen, each counted once; places within the picture count too."""
    left = list(reading.objects)
    wanted = [group for group in facts.groups for _ in range(group.count)]
    found = 0
    for group in sorted(wanted, key=lambda own: [own.color, own.size, own.place].count(None)):
        fitting = next((own for own in left if group.fits(own, reading.lattice)), None)
        if fitting is not None:
            left.remove(fitting)
            found += 1
    return 2 * found / max(1, len(wanted) + len(reading.objects))


def word_reward(prompts: list, drawn: list, words: list[str | None], **columns) -> list[float | None]:
    """`ocr_score` of the words read in each picture, by the column `words`; `None` where it has none."""
    reader, rewards = SignReader(), []
    for picture, wanted in zip(drawn, words):
        if not wanted or not wanted.split():
            rewards.append(None)
            continue
        lines = () if picture is None else reader.read(np.asarray(picture.convert("RGB"))).lines
        rewards.append(ocr_score([(word, 1.0) for line in lines for word in line.split()], wanted.split()))
    return rewards
