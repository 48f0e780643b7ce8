"""From verdicts, words and a scorer's own file to scores, and on to a model card.

Every score has `score`, and `low` and `high` of its 95 % interval from resampling prompts.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult

from ..intervals import interval, resample, summarize
from ..training.rewards import letters_right
from .formats import BENCHMARKS, PRISM_TRACKS, Item, words_of
from .judge import Verdicts
from .questions import Marks

Scores = dict[str, dict[str, float]]

WISE_WEIGHTS = {"cultural": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1}
"""Weights of the categories of WISE in its overall score, as its README has them."""


def score_verdicts(name: str, items: Sequence[Item], verdicts: Verdicts) -> Scores:
    """Scores of a judged benchmark; items without marks count nowhere.

    Args:
        name: The benchmark.
        items: Its prompts.
        verdicts: What the judge said.
    """
    return _JUDGED[name](items, verdicts)


def _wise(items: Sequence[Item], verdicts: Verdicts) -> Scores:
    groups = _by_group(items, lambda item: _wiscore(_marks(verdicts, item, "wiscore")))
    scores = {category: interval(groups[category]) for category in WISE_WEIGHTS if category in groups}
    if len(scores) == len(WISE_WEIGHTS):
        scores["overall"] = _combined([(groups[own], weight) for own, weight in WISE_WEIGHTS.items()])
    return scores


def _wiscore(marks: Marks | None) -> float | None:
    if marks is None:
        return None
    consistency, realism, aesthetic = marks
    return (0.7 * consistency + 0.2 * realism + 0.1 * aesthetic) / 2


def _prism(items: Sequence[Item], verdicts: Verdicts) -> Scores:
    scores = {}
    for question in ("alignment", "aesthetics"):
        groups = _by_group(items, lambda item, question=question: _lowest(_marks(verdicts, item, question)))
        scores |= {f"{track}: {question}": interval(groups[track]) for track in PRISM_TRACKS if track in groups}
        if len(groups) == len(PRISM_TRACKS):
            scores[f"all tracks: {question}"] = _mean_of(groups.values())
    return scores


def _imgedit(items: Sequence[Item], verdicts: Verdicts) -> Scores:
    def mean(item: Item) -> float | None:
        marks = _marks(verdicts, item, "edit")
        return None if marks is None else sum(marks) / len(marks)

    return {kind: interval(own) for kind, own in sorted(_by_group(items, mean).items())}


def _gedit(items: Sequence[Item], verdicts: Verdicts) -> Scores:
    scores = {}
    for measure, groups in _products(items, verdicts, "SC", "PQ", "O").items():
        for group, own in sorted(groups.items()):
            scores[f"{group}: {measure}"] = interval(own)
        for language in sorted({group.partition("/")[0] for group in groups}):
            tasks = [own for group, own in groups.items() if group.partition("/")[0] == language]
            scores[f"{language}, mean of edits: {measure}"] = interval([mark for own in tasks for mark in own])
            scores[f"{language}, mean of tasks: {measure}"] = _mean_of(tasks)
    return scores


def _omnicontext(items: Sequence[Item], verdicts: Verdicts) -> Scores:
    scores = {}
    for measure, groups in _products(items, verdicts, "PF", "SC", "overall").items():
        for task, own in sorted(groups.items()):
            scores[f"{task}: {measure}"] = interval(own)
        scores[f"mean of tasks: {measure}"] = _mean_of(groups.values())
    return scores


_JUDGED: dict[str, Callable[[Sequence[Item], Verdicts], Scores]] = {
    "wise": _wise,
    "prism": _prism,
    "imgedit": _imgedit,
    "gedit": _gedit,
    "omnicontext": _omnicontext,
}


def _products(
    items: Sequence[Item], verdicts: Verdicts, first: str, second: str, product: str
) -> dict[str, dict[str, list[float]]]:
    """Marks of two questions and the root of their product, by group, of items that have both."""
    result: dict[str, dict[str, list[float]]] = {first: {}, second: {}, product: {}}
    for item in items:
        marks = [_lowest(_marks(verdicts, item, question)) for question in (first, second)]
        if None not in marks:
            for measure, mark in zip(result, (*marks, sqrt(marks[0] * marks[1]))):
                result[measure].setdefault(item.group, []).append(mark)
    return {measure: groups for measure, groups in result.items() if groups}


def _marks(verdicts: Verdicts, item: Item, question: str) -> Marks | None:
    verdict = verdicts.get(item.key, question)
    return None if verdict is None else verdict.marks


def _lowest(marks: Marks | None) -> float | None:
    return None if marks is None else min(marks)


def _by_group(items: Iterable[Item], mark: Callable[[Item], float | None]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for item in items:
        own = mark(item)
        if own is not None:
            groups.setdefault(item.group, []).append(own)
    return groups


def _mean_of(groups: Iterable[Sequence[float]]) -> dict[str, float]:
    """The mean of groups' means, each resampled within itself."""
    groups = list(groups)
    return _combined([(own, 1 / len(groups)) for own in groups])


def _combined(groups: Sequence[tuple[Sequence[float], float]]) -> dict[str, float]:
    """A weighted sum of groups' means, each resampled within itself."""
    rng = np.random.default_rng(0)
    score = sum(weight * np.mean(own) for own, weight in groups)
    return summarize(score, sum(weight * resample(np.asarray(own, float)[None], rng)[0] for own, weight in groups))


# ---- words -----------------------------------------------------------------------------------------------------------


def score_words(items: Sequence[Item], read: Mapping[str, Sequence[str]]) -> Scores:
    """Word accuracy and NED of CVTG-2K, overall and by subset and number of texts.

    A word is right where it was read, letter by letter but for case, and each word that was read makes one right at
    most. A word's NED is 1 - its edit distance to the likeliest word that was read, over the longer one's length.

    Args:
        items: The benchmark's prompts.
        read: What was read in each picture, by the item's name: words or lines.
    """
    rows: dict[str, list[tuple[float, float, int]]] = {}
    for item in items:
        wanted = words_of(item.prompt)
        found = [word for text in read[item.key] for word in text.lower().split()]
        right = (Counter(wanted) & Counter(found)).total()
        near = sum(max((letters_right(word, own) for own in found), default=0.0) for word in wanted)
        for group in ("all", item.group):
            rows.setdefault(group, []).append((right, near, len(wanted)))
    scores = {}
    for group, own in rows.items():
        # The same pictures are drawn for both rows of a ratio, since one generator's state serves all rows at once.
        right, near, words = resample(np.array(own, float).T, np.random.default_rng(0))
        sums = np.array(own, float).sum(axis=0)
        scores[f"{group}: word accuracy"] = summarize(sums[0] / sums[2], right / words)
        scores[f"{group}: NED"] = summarize(sums[1] / sums[2], near / words)
    return scores


def read_ocr(file: Path, items: Sequence[Item]) -> dict[str, list[str]]:
    """What an OCR program read in each picture, by the item's name.

    Args:
        file: A JSON object of lists of words or lines, by the picture's path in the run's folder.
        items: The benchmark's prompts.

    Raises:
        ValueError: If it is no such object, or a picture is missing.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The file of words {file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object of lists of words by picture.")
    missing = [item.pictures[0] for item in items if item.pictures[0] not in content]
    if missing:
        raise ValueError(f"{file} lacks {len(missing)} picture(s), the first of them {missing[0]!r}.")
    for name, words in content.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{file}: what was read in {name!r} must be a list of texts.")
    return {item.key: content[item.pictures[0]] for item in items}


# ---- GenEval ---------------------------------------------------------------------------------------------------------


def score_geneval(file: Path, items: Sequence[Item]) -> Scores:
    """Scores of GenEval from its scorer's own `results.jsonl`: each task, and the mean of the tasks.

    Args:
        file: One JSON object a picture with `filename` and `correct`.
        items: The benchmark's prompts.

    Raises:
        ValueError: If the file is not the scorer's, or is not of these very pictures.
    """
    wanted = {own: item for item in items for own in item.pictures}
    found: dict[str, bool] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found["/".join(Path(record["filename"]).parts[-3:])] = bool(record["correct"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is not the `results.jsonl` of GenEval's scorer: {error!r}") from error
    if found.keys() != wanted.keys():
        raise ValueError(
            f"{file} is of other pictures than this folder's: {len(found.keys() - wanted.keys())} are not here, "
            f"{len(wanted.keys() - found.keys())} of here are not there."
        )
    tasks: dict[str, list[float]] = {}
    for item in items:
        tasks.setdefault(item.group, []).append(float(np.mean([found[own] for own in item.pictures])))
    return {task: interval(own) for task, own in tasks.items()} | {"overall": _mean_of(tasks.values())}


# ---- model cards -----------------------------------------------------------------------------------------------------


def eval_results(path: str | Path) -> list[EvalResult]:
    """A run's `results.json` as entries of a model card's `model-index`, each with the settings that moved it.

    Pass them as `ModelCardData(eval_results=...)`.

    Raises:
        ValueError: If the file is no run's, or has no scores.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        benchmark, scores, settings = BENCHMARKS[result["benchmark"]], result["scores"], result["settings"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not the `results.json` of a benchmark's run: {error!r}") from error
    if not scores:
        raise ValueError(f"{path} has no scores: {result['not_computed']}")
    return [
        EvalResult(
            task_type=benchmark.task,
            dataset_type=result["benchmark"],
            dataset_name=benchmark.title,
            metric_type=name,
            metric_value=own["score"],
            metric_args={"low": own["low"], "high": own["high"], "unjudged": result["unjudged"], **settings},
        )
        for name, own in scores.items()
    ]
