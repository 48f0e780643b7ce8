"""Working in words, part by part: how often a description, a change in words, and a picture of right words are right.

    python benchmarks/in_words.py

Tests of the validation split. Descriptions are right to the letter; of several guesses the one with the greatest
log p(words | picture) + w log p(picture | words) is taken. Drafts are drawn of the true prompts of edited scenes, as
the checkpoint draws at once and as the adapter says, and one is taken likewise. Told means from true descriptions, with
no picture read or drawn: the likeliest words, and of several guesses the one that is best when it is checked. Writes
`benchmarks/results/in_words.json` and the tables in `docs/abilities.md`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, record, table, write_json

from nextflow_hf import ADAPTERS
from nextflow_hf.abilities import Tested, edits_of, examples_of, score_comparison, score_questions, shows
from nextflow_hf.conversations import DESCRIPTION
from nextflow_hf.evaluation import weights_hash
from nextflow_hf.in_words import DRAFTS, GUESSES, add_adapter, answer_in_words, guess, looking
from nextflow_hf.inference import assistant, draw, load, user
from nextflow_hf.likelihood import answer_log_probs, picture_log_probs
from nextflow_hf.scenes import WHOLE_QUESTION, Referee
from nextflow_hf.scenes.captions import tell_all
from nextflow_hf.scenes.tasks import EXAMPLE_PROMPT

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "abilities.md"
BEGIN, END = "<!-- in words: begin -->", "<!-- in words: end -->"
WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
BATCH = 16


@dataclass(frozen=True)
class Told(Tested):
    """Shows its scenes in words, and makes so many guesses at thought and answer."""

    guesses: int = GUESSES

    def picture(self, scene):
        return {"type": "image", DESCRIPTION: tell_all(scene)}

    def answer(self, conversations, way=""):
        return answer_in_words(self.model, self.processor, conversations, guesses=self.guesses)


def best(right: np.ndarray, read: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """Share of rows right by the column that is taken, for each weight of drawing; all `(tests, options)`."""
    rows = np.arange(len(right))
    shares = {f"{weight}": right[rows, (read + weight * drawn).argmax(axis=1)].mean() for weight in WEIGHTS}
    return {"first": right[:, 0].mean(), **shares, "any": right.max(axis=1).mean()}


def score_descriptions(tested: Tested) -> dict[str, float]:
    """Descriptions of the tests' scenes that are right to the letter."""
    model, processor, level = tested.model, tested.processor, tested.resolution
    scenes = [scene for scene, _ in tested.scenes()]
    right, read, drawn = [], [], []
    for first in range(0, len(scenes), BATCH):
        chosen = scenes[first : first + BATCH]
        pictures = [tested.picture(scene) for scene in chosen]
        with looking(model):
            said, scores = guess(model, processor, [[user(own, WHOLE_QUESTION)] for own in pictures], GUESSES, level)
        ended = [[user(text or "nothing"), assistant(pictures[row // GUESSES])] for row, text in enumerate(said)]
        wanted = [tell_all(scene) for scene in chosen for _ in range(GUESSES)]
        right += [one == other for one, other in zip(said, wanted)]
        read += scores.tolist()
        drawn += picture_log_probs(model, processor, ended, resolution=level).tolist()
    return best(*(np.array(own, float).reshape(-1, GUESSES) for own in (right, read, drawn)))


def score_drafts(tested: Tested, **sampling) -> dict[str, float]:
    """Pictures of the true prompts of edited scenes that show exactly these."""
    model, processor, level = tested.model, tested.processor, tested.resolution
    scenes, referee = [edit.after for edit in edits_of(tested)], Referee(tested.lattice)
    prompts, size = list(map(tell_all, scenes)), {"image_size": tested.size}
    right, read, drawn = [], [], []
    for draft in range(DRAFTS):
        seeds = [tested.seed + 1_000_003 * draft + index for index in range(len(prompts))]
        pictures = draw(model, processor, [[user(own)] for own in prompts], seeds, **size, **sampling)
        right.append([shows(referee.look(picture), scene) for picture, scene in zip(pictures, scenes)])
        said = [[user(picture, WHOLE_QUESTION), assistant(own)] for picture, own in zip(pictures, prompts)]
        with looking(model):
            read.append(answer_log_probs(model, processor, said, resolution=level).tolist())
        asked = [[user(own), assistant(picture)] for picture, own in zip(pictures, prompts)]
        drawn.append(picture_log_probs(model, processor, asked, resolution=level).tolist())
    return best(*(np.array(own, float).T for own in (right, read, drawn)))


def score_told(told: Told) -> dict[str, float]:
    """What is right where the model is told what pictures show."""
    edits, examples = edits_of(told), examples_of(told)
    changed = told.answer([[user(told.picture(edit.before), edit.text)] for edit in edits])
    right = [said == tell_all(edit.after) for said, edit in zip(changed, edits)]
    kinds = np.array([edit.kind for edit in edits])
    asked, wanted = [], []
    for befores, afters in examples:
        shown = [told.picture(own) for pair in zip(befores, afters) for own in pair]
        asked.append([user(*shown[:-1], EXAMPLE_PROMPT)])
        wanted.append(tell_all(afters[-1]))
    return {
        "edits": np.mean(right),
        **{f"edits: {kind}": np.mean(np.array(right)[kinds == kind]) for kind in dict.fromkeys(kinds.tolist())},
        "comparison": score_comparison(told)["comparison"]["score"],
        "questions": score_questions(told)["questions"]["score"],
        "in-context edits": np.mean([said == own for said, own in zip(told.answer(asked), wanted)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--adapter", default="mini")
    parser.add_argument("--tests", type=int, default=80)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS / "in_words.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load(args.checkpoint)
    add_adapter(model, args.adapter)
    settings = (model, processor, (64, 64), args.tests, args.seed, args.split)
    tested, likeliest, checked = Tested(*settings), Told(*settings, guesses=1), Told(*settings)
    chosen = {
        "descriptions, by guesses": score_descriptions(tested),
        "pictures, by drafts as the checkpoint draws": score_drafts(tested),
        "pictures, by drafts as the adapter says": score_drafts(tested, generation_config=model.drafting),
    }
    by_skill = {"told, the likeliest alone": score_told(likeliest), "told": score_told(checked)}
    result = {
        name: {key: round(float(value), 4) for key, value in own.items()}
        for name, own in {**chosen, **by_skill}.items()
    }
    adapter_hash = weights_hash(ADAPTERS.get(args.adapter, args.adapter))
    write_json(args.output, {**record(args.threads), "adapter_sha256": adapter_hash, "tests": args.tests, **result})
    header = ["right", "the first alone", *(f"w = {weight:g}" for weight in WEIGHTS), "any"]
    rows = [[name, *(f"{value:.2f}" for value in result[name].values())] for name in chosen]
    skills = [
        [name, f"{value:.2f}", f"{result['told'][name]:.2f}"]
        for name, value in result["told, the likeliest alone"].items()
    ]
    told = table(["told", "right: the likeliest words", f"of {GUESSES} guesses, checked"], skills)
    text = f"{table(header, rows)}\n\n{told}"
    print(text)
    if args.output == RESULTS / "in_words.json":
        before, after = DOCUMENT.read_text().split(BEGIN)[0], DOCUMENT.read_text().split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
