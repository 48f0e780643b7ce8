"""A small world with a referee: pictures made by a program that knows what they show."""

from .calibration import calibrate
from .captions import Facts, Group, caption, caption_with_places, describe, facts_match, is_complete, parse
from .prompts import ScenePrompt, make_prompts, scene_for
from .referee import Reading, Referee, SeenObject, Verdict
from .rewards import (
    AnswerPrompts,
    EditPrompts,
    ScenePrompts,
    SceneReward,
    WordPrompts,
    answer_reward,
    objects_f1,
    scene_reward,
    word_reward,
)
from .sampling import CATEGORIES, SPLITS, sample_scene
from .signs import ReadSign, Sign, SignReader, draw_sign, render_sign, transcript, words_of_sign
from .source import QUESTION, READ_QUESTION, WHOLE_QUESTION, SceneRecords, SceneSource, SignSource
from .tasks import TaskRecords
from .world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, SceneObject, lattice_for, relation, render

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLORS",
    "PLACES",
    "QUESTION",
    "READ_QUESTION",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "WHOLE_QUESTION",
    "AnswerPrompts",
    "EditPrompts",
    "Facts",
    "Group",
    "ReadSign",
    "Reading",
    "Referee",
    "Scene",
    "SceneObject",
    "ScenePrompt",
    "ScenePrompts",
    "SceneRecords",
    "SceneReward",
    "SceneSource",
    "SeenObject",
    "Sign",
    "SignReader",
    "SignSource",
    "TaskRecords",
    "Verdict",
    "WordPrompts",
    "answer_reward",
    "calibrate",
    "caption",
    "caption_with_places",
    "describe",
    "draw_sign",
    "facts_match",
    "is_complete",
    "lattice_for",
    "make_prompts",
    "objects_f1",
    "parse",
    "relation",
    "render",
    "render_sign",
    "sample_scene",
    "scene_for",
    "scene_reward",
    "transcript",
    "word_reward",
    "words_of_sign",
]
