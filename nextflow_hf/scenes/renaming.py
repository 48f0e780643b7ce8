"""Other names for colours and shapes, in texts without pictures.

Who has always read of the same six shapes goes by which of them stand together. Of a wheel and a kite nothing is known
but what was said, so copying and changing of what was said is all that helps, and that holds for combinations that were
never seen, too.
"""

import re

import numpy as np

from ..conversations import DESCRIPTION
from .captions import PLURALS
from .world import COLORS, SHAPES

OTHER_COLORS = ("bad", "chess", "day", "deep", "grass", "lemon", "mixed", "night", "plum", "ripe", "sea", "written")
OTHER_SHAPES = (
    *("badge", "board", "car", "carrot", "coin", "flag", "kite", "list"),
    *("piglet", "sign", "story", "sun", "title", "tomato", "wheel", "word"),
)


def rename(messages: list[dict], rng: np.random.Generator) -> list[dict]:
    """Turns of texts in which all colours, all shapes, or all of both have other names, the same throughout."""
    which = rng.integers(3)
    names: dict[str, str] = {}
    if which != 0:
        names |= zip(COLORS, rng.permutation(OTHER_COLORS).tolist())
    if which != 1:
        shapes = dict(zip(SHAPES, rng.permutation(OTHER_SHAPES).tolist()))
        names |= {**shapes, **{PLURALS[shape]: f"{name}s" for shape, name in shapes.items()}}
    # None of the other names begins with a vowel.
    known = re.compile(rf"\b(?:(an?) )?({'|'.join(names)})\b")

    def renamed(own):
        if isinstance(own, str):
            return known.sub(lambda found: ("a " if found[1] else "") + names[found[2]], own)
        return [renamed(wording) for wording in own]

    def part(own: dict) -> dict:
        return {**own, **{name: renamed(own[name]) for name in ("text", DESCRIPTION) if name in own}}

    return [{**turn, "content": list(map(part, turn["content"]))} for turn in messages]
