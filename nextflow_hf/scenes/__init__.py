"""A small world with a referee: pictures made by a program that knows what they show."""

from .calibration import calibrate
from .captions import Facts, Group, caption, caption_with_places, describe, facts_match, is_complete, parse
from .prompts import ScenePrompt, make_prompts, scene_for
from .referee import Reading, Referee, SeenObject, Verdict
from .sampling import CATEGORIES, SPLITS, sample_scene
from .source import QUESTION, SceneRecords, SceneSource
from .world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, SceneObject, lattice_for, relation, render

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLORS",
    "PLACES",
    "QUESTION",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Facts",
    "Group",
    "Reading",
    "Referee",
    "Scene",
    "SceneObject",
    "ScenePrompt",
    "SceneRecords",
    "SceneSource",
    "SeenObject",
    "Verdict",
    "calibrate",
    "caption",
    "caption_with_places",
    "describe",
    "facts_match",
    "is_complete",
    "lattice_for",
    "make_prompts",
    "parse",
    "relation",
    "render",
    "sample_scene",
    "scene_for",
]
