"""Words in pictures before and after their reward: what a reader finds in pictures of words that training never saw.

    nextflow-hf train mini-words
    python benchmarks/words.py runs/mini/pretrain-words/final runs/mini/grpo-words/final

Words of the test split, in any colour on any background, asked for as in training, in ways that no example had, and in
ways that no reward had either; a word counts where the reader finds it to the letter. Writes
`benchmarks/results/words.json`, and in `docs/rl.md` the table and the last checkpoint's first eight pictures, asked for
as in training and in the ways of rewards.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, record, table, write_json

from nextflow_hf.abilities import Tested
from nextflow_hf.demo import tiled
from nextflow_hf.evaluation import evaluate_words
from nextflow_hf.files import save_picture
from nextflow_hf.inference import draw, load, user
from nextflow_hf.scenes import draw_sign
from nextflow_hf.scenes.signs import SIGN_SIZE, ask_freely, words_of_sign

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "rl.md"
BEGIN, END = "<!-- words: begin -->", "<!-- words: end -->"


def save_sheet(checkpoint: str, path: Path, split: str, seed: int, number: int = 8) -> None:
    """The first pictures that were scored, asked for as in training, and below in other ways."""
    model, processor = load(checkpoint)
    tested = Tested(model, processor, SIGN_SIZE, number, seed, split)
    signs = [draw_sign(tested.rng(index), split, document_share=0.0) for index in range(number)]
    rng = np.random.default_rng(seed)
    asked = [words_of_sign(own) for own in signs] + [ask_freely(own, rng) for own in signs]
    seeds = [seed + index for index in range(number)] * 2
    pictures = draw(model, processor, [[user(own)] for own in asked], seeds, image_size=SIGN_SIZE)
    save_picture(tiled(pictures, columns=4), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders of checkpoints")
    parser.add_argument("--tests", type=int, default=400)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS / "words.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scores = {own: evaluate_words(own, args.tests, args.seed, args.split) for own in args.checkpoints}
    measured = [own["words"] for own in scores.values()]
    rows = [
        [
            measure,
            *(
                f"{own[measure]['score']:.3f} ({own[measure]['low']:.3f} to {own[measure]['high']:.3f})"
                for own in measured
            ),
        ]
        for measure in measured[0]
    ]
    write_json(args.output, {**record(args.threads), "scores": scores})
    text = table(["", *(Path(own).parent.name for own in args.checkpoints)], rows)
    print(text)
    if args.output == RESULTS / "words.json":
        save_sheet(args.checkpoints[-1], DOCUMENT.parent / "images" / "words.png", args.split, args.seed)
        text += "\n\n![Words drawn](images/words.png)"
        before, after = DOCUMENT.read_text().split(BEGIN)[0], DOCUMENT.read_text().split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
