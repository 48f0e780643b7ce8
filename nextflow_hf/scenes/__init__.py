"""A small world with a referee: pictures made by a program that knows what they show."""

from .captions import Facts, Group, caption, describe, facts_match, parse
from .sampling import CATEGORIES, sample_scene
from .source import SceneSource
from .world import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, SceneObject, relation, render

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLORS",
    "SHAPES",
    "SIZES",
    "Facts",
    "Group",
    "Scene",
    "SceneObject",
    "SceneSource",
    "caption",
    "describe",
    "facts_match",
    "parse",
    "relation",
    "render",
    "sample_scene",
]
