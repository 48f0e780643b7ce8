"""What a judge is asked about each benchmark's pictures, and how its answers are read: strictly, or not at all."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .formats import PRISM_TRACKS, Item

Marks = list[float]

# Spellings of the same places in the benchmarks' own templates, and ours.
_PLACES = {
    "<prompt>": "prompt",
    "<instruction>": "prompt",
    "<edit_prompt>": "prompt",
    "{text_prompt}": "prompt",
    "<explanation>": "explanation",
}


@dataclass(frozen=True)
class Question:
    """One thing that a judge is asked of a picture.

    Attributes:
        name: Its name in verdicts and scores.
        read: Turns an answer into marks; raises `ValueError` where it is not exactly as asked.
        sees_sources: Whether the source pictures are shown before the picture itself.
        template_key: Which of a file's several templates is for an item.
        fallback: Our own template, where the user gives none.
        needs_prompt: Whether a template without a place for the prompt is a mistake.
        area: Pixels that each picture is brought to before it is shown; `None` shows it as it is.
    """

    name: str
    read: Callable[[str], Marks]
    sees_sources: bool
    template_key: Callable[[Item], str]
    fallback: str
    needs_prompt: bool = True
    area: int | None = None


class Templates:
    """The judge's templates: the user's file, or ours.

    Args:
        questions: What is asked.
        items: Of what.
        file: A text file where there is one template, else a JSON object of templates by name; `None` takes ours.

    Raises:
        ValueError: If the file cannot be read, lacks a template, or a template has no place for the prompt.
    """

    def __init__(self, questions: Sequence[Question], items: Sequence[Item], file: Path | None = None):
        self.file = file
        needed = {question.template_key(item): question for question in questions for item in items}
        if file is None:
            self._texts = {key: question.fallback for key, question in needed.items()}
        else:
            self._texts = _read_templates(file, list(needed))
        for key, question in needed.items():
            text = self._texts[key]
            if question.needs_prompt and not any(place in text for place, own in _PLACES.items() if own == "prompt"):
                raise ValueError(
                    f"The template {key!r} in {file} has no place for the prompt; write "
                    f"{' or '.join(place for place, own in _PLACES.items() if own == 'prompt')} where it goes."
                )
        self.sha256 = hashlib.sha256(json.dumps(self._texts, sort_keys=True).encode()).hexdigest()

    def fill(self, question: Question, item: Item) -> str:
        """The text for one item; what a prompt says is never taken for a place."""
        fields = {"prompt": item.prompt, **item.fields}
        pattern = "|".join(re.escape(place) for place, own in _PLACES.items() if own in fields)
        return re.sub(pattern, lambda found: fields[_PLACES[found[0]]], self._texts[question.template_key(item)])


def _read_templates(file: Path, keys: list[str]) -> Mapping[str, str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The judge's template {file} cannot be read: {error}") from error
    if file.suffix != ".json":
        if len(keys) > 1:
            raise ValueError(
                f"{file} holds one template, but this benchmark has {len(keys)}: give a .json file with an object of "
                f"{sorted(keys)}."
            )
        return {keys[0]: text}
    try:
        templates = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"The judge's template {file} is no JSON: {error}") from error
    if not isinstance(templates, dict) or not all(isinstance(own, str) for own in templates.values()):
        raise ValueError(f"The judge's template {file} must be a JSON object of texts.")
    missing = sorted(set(keys) - set(templates))
    if missing:
        raise ValueError(f"The judge's template {file} lacks {missing}; it has {sorted(templates)}.")
    return {key: templates[key] for key in keys}


_LINE = re.compile(r"^[ \t]*([^:\uff1a\n]+?)[ \t]*[:\uff1a][ \t]*(-?\d+)[ \t]*\r?$", re.MULTILINE)


# ---- reading answers -------------------------------------------------------------------------------------------------


def read_lines(names: Sequence[str] | int, low: int, high: int) -> Callable[[str], Marks]:
    """Reader of answers with one `NAME: NUMBER` a line.

    Args:
        names: The names, each exactly once; or how many lines there are, whatever their names.
        low: Smallest mark; marks are whole numbers.
        high: Largest mark.
    """

    def read(answer: str) -> Marks:
        # Judges set names in bold although nobody asks them to; some write the wide colon of Chinese text.
        found = _LINE.findall(answer.replace("*", ""))
        if isinstance(names, int):
            if len(found) != names:
                raise ValueError(f"{names} lines `NAME: NUMBER` are needed, got {len(found)}.")
            marks = [int(number) for _, number in found]
        else:
            given = [name.lower() for name, _ in found]
            if sorted(given) != sorted(name.lower() for name in names):
                raise ValueError(f"One line each is needed of {list(names)}, got {given}.")
            marks = [int(found[given.index(name.lower())][1]) for name in names]
        return _within(marks, low, high)

    return read


def read_score(count: int, low: int, high: int) -> Callable[[str], Marks]:
    """Reader of answers with one JSON object whose `score` is a number, or a list of `count` numbers."""

    def read(answer: str) -> Marks:
        start = answer.find("{")
        if start < 0:
            raise ValueError("There is no JSON object.")
        try:
            record, end = json.JSONDecoder().raw_decode(answer, start)
        except json.JSONDecodeError as error:
            raise ValueError(f"The JSON object cannot be read: {error}") from error
        if "{" in answer[end:]:
            raise ValueError("There are several JSON objects; one is needed.")
        score = record.get("score")
        marks = score if isinstance(score, list) else [score]
        if len(marks) != count or any(isinstance(own, bool) or not isinstance(own, (int, float)) for own in marks):
            raise ValueError(f"`score` must hold {count} number(s), got {score!r}.")
        return _within(marks, low, high)

    return read


def _within(marks: Sequence[float], low: int, high: int) -> Marks:
    # The negation catches NaN as well.
    if not all(low <= own <= high for own in marks):
        raise ValueError(f"Marks lie between {low} and {high}, got {list(marks)}.")
    return [float(own) for own in marks]


# ---- the questions ---------------------------------------------------------------------------------------------------

_WISE = """\
The picture was drawn for the request below. The note says what the request really means; it was not shown to whoever
drew the picture.

Request: <prompt>
Note: <explanation>

Give three whole numbers, each 0, 1 or 2:
- Consistency: does the picture show what the request means (0: no, 1: in part, 2: in every respect)?
- Realism: could it be a photograph of real things (0: no, 1: with flaws, 2: without any)?
- Aesthetic Quality: is it well composed and good to look at (0: no, 1: passable, 2: outstanding)?
When in doubt take the lower number. Answer with these three lines and nothing else:
Consistency: NUMBER
Realism: NUMBER
Aesthetic Quality: NUMBER
"""

_PRISM_ALIGNMENT = """\
The picture was drawn for this request:
<prompt>

How well does the picture show what the request says, in every part? 0 means that it has nothing to do with it, 10 that
nothing at all is missing, wrong or added. Answer with one JSON object and nothing else:
{"justification": "one sentence", "score": NUMBER}
"""

_PRISM_AESTHETICS = """\
The picture was drawn for this request:
<prompt>

Leave aside whether it fits. How good is it as a picture: sound shapes and bodies, convincing light and surfaces,
composition, no smears or artefacts that the request did not ask for? 0 means broken, 10 flawless. Answer with one JSON
object and nothing else:
{"justification": "one sentence", "score": NUMBER}
"""

_IMGEDIT = """\
The first picture was to be changed by the instruction below; the second is the result.

Instruction: <edit_prompt>

Give three whole numbers from 1 (worst) to 5 (best):
- Instruction: was what was asked for done, in full and nothing beyond it?
- Quality: does the change look natural, without seams or artefacts?
- Preservation: is everything that was not to change as it was before?
Answer with these three lines and nothing else:
Instruction: NUMBER
Quality: NUMBER
Preservation: NUMBER
"""

_EDIT_SEMANTICS = """\
The first picture was to be changed by the instruction below; the second is the result.

Instruction: <instruction>

Give two numbers from 0 (worst) to 10 (best): how far the instruction was followed, and how far the second picture left
alone what was not to change. Answer with one JSON object and nothing else:
{"reasoning": "one sentence", "score": [NUMBER, NUMBER]}
"""

_EDIT_QUALITY = """\
This picture is the result of an edit. Give two numbers from 0 (worst) to 10 (best): how natural it looks as a whole,
and how free it is of artefacts such as smears, seams and broken shapes. Answer with one JSON object and nothing else:
{"reasoning": "one sentence", "score": [NUMBER, NUMBER]}
"""

_SUBJECT_PROMPT = """\
The last picture was drawn by the instruction below with the pictures before it as references.

Instruction: <instruction>

How far was the instruction followed? 0 means not at all, 10 in every respect. Answer with one JSON object and nothing
else:
{"reasoning": "one sentence", "score": NUMBER}
"""

_SUBJECT_CONSISTENCY = """\
The last picture was drawn by the instruction below with the pictures before it as references.

Instruction: <instruction>

Are the persons, objects and scenes that the instruction takes from the references the same ones in the last picture? 0
means that none can be recognised, 10 that all are identical. Answer with one JSON object and nothing else:
{"reasoning": "one sentence", "score": NUMBER}
"""


def _named(name: str) -> Callable[[Item], str]:
    return lambda item: name


def _track(item: Item) -> str:
    return item.group


QUESTIONS: dict[str, tuple[Question, ...]] = {
    "wise": (
        Question(
            "wiscore",
            read_lines(("Consistency", "Realism", "Aesthetic Quality"), 0, 2),
            False,
            _named("wiscore"),
            _WISE,
        ),
    ),
    "prism": (
        # One template per track, as the benchmark has them.
        Question("alignment", read_score(1, 0, 10), False, _track, _PRISM_ALIGNMENT),
        Question("aesthetics", read_score(1, 0, 10), False, _named("aesthetics"), _PRISM_AESTHETICS),
    ),
    # One template per kind of edit, as the benchmark's file of templates has them.
    "imgedit": (Question("edit", read_lines(3, 1, 5), True, _track, _IMGEDIT),),
    "gedit": (
        Question("SC", read_score(2, 0, 10), True, _named("SC"), _EDIT_SEMANTICS, area=512 * 512),
        Question("PQ", read_score(2, 0, 10), False, _named("PQ"), _EDIT_QUALITY, needs_prompt=False, area=512 * 512),
    ),
    "omnicontext": (
        Question("PF", read_score(1, 0, 10), True, _named("PF"), _SUBJECT_PROMPT),
        # The benchmark asks in other words where a scene is among the references.
        Question(
            "SC",
            read_score(1, 0, 10),
            True,
            lambda item: "SC_scene" if "scene" in item.group else "SC",
            _SUBJECT_CONSISTENCY,
        ),
    ),
}
"""What is asked of each judged benchmark."""

TEMPLATE_NAMES = {
    "wise": "one text",
    "prism": f"JSON: {', '.join(PRISM_TRACKS)}, aesthetics",
    "imgedit": "JSON: one text per `edit_type`, as the benchmark's own file",
    "gedit": "JSON: SC, PQ",
    "omnicontext": "JSON: PF, SC, SC_scene",
}
"""What a file of templates holds."""
