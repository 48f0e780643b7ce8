"""Words in pictures before and after their reward: what a reader finds in pictures of words that training never saw.

    nextflow-hf train mini-words
    python benchmarks/words.py runs/mini/pretrain-words/final runs/mini/grpo-words/final

Words of the test split, in any colour on any background; a word counts where the reader finds it to the letter. Writes
`benchmarks/results/words.json`, and in `docs/rl.md` the table and the last checkpoint's first twelve pictures.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, record, table, write_json
from PIL import Image

from nextflow_hf.evaluation import weights_hash
from nextflow_hf.files import save_picture
from nextflow_hf.inference import draw, load, user
from nextflow_hf.intervals import interval
from nextflow_hf.scenes import SignReader, WordPrompts, word_reward
from nextflow_hf.scenes.signs import SIGN_SIZE
from nextflow_hf.training.rewards import letters_right

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "rl.md"
BEGIN, END = "<!-- words: begin -->", "<!-- words: end -->"


def score(checkpoint: str, tests: int, split: str, seed: int) -> tuple[dict, list[Image.Image]]:
    """Words and letters right (1 - normalised edit distance), and the reward, of what a checkpoint draws; and that."""
    model, processor = load(checkpoint)
    rows = list(WordPrompts(tests, split, seed))
    asked = [row["prompt"][0]["content"] for row in rows]
    pictures = draw(model, processor, [[user(own)] for own in asked], list(range(tests)), image_size=SIGN_SIZE)
    reader = SignReader()
    read, wanted = [reader.read(picture).text for picture in pictures], [row["words"] for row in rows]
    scores = {
        "weights_sha256": weights_hash(checkpoint),
        "words": interval([found == own for found, own in zip(read, wanted)]),
        "letters": interval([letters_right(found, own) for found, own in zip(read, wanted)]),
        "reward": round(float(np.mean(word_reward(asked, pictures, wanted))), 4),
    }
    return scores, pictures


def save_sheet(pictures: list[Image.Image], path: Path, columns: int = 4, factor: int = 2) -> None:
    """Pictures side by side, each pixel `factor` times as wide."""
    height, width = SIGN_SIZE
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    save_picture(sheet.resize((factor * sheet.width, factor * sheet.height), Image.Resampling.NEAREST), path)


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
    results = {own: score(own, args.tests, args.split, args.seed) for own in args.checkpoints}
    scores, pictures = {name: own for name, (own, _) in results.items()}, results[args.checkpoints[-1]][1]
    write_json(
        args.output,
        {**record(args.threads), "tests": args.tests, "split": args.split, "seed": args.seed, "scores": scores},
    )
    rows = [
        [Path(name).parent.name]
        + [
            f"{own[measure]['score']:.3f} ({own[measure]['low']:.3f} to {own[measure]['high']:.3f})"
            for measure in ("words", "letters")
        ]
        + [f"{own['reward']:.2f}"]
        for name, own in scores.items()
    ]
    text = table(["", "words", "letters", "reward, at most 2"], rows)
    print(text)
    if args.output == RESULTS / "words.json":
        save_sheet(pictures[:12], DOCUMENT.parent / "images" / "words.png")
        text += "\n\n![Words drawn](images/words.png)"
        before, after = DOCUMENT.read_text().split(BEGIN)[0], DOCUMENT.read_text().split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
