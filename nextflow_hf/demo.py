"""`make demo`: draws a contact sheet, shows a picture sharpening scale by scale, describes pictures, answers questions
about them, edits others, thinks before it draws, tells a story, refines a picture, writes words, and draws larger."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from .chat import write_story
from .files import save_picture, write_whole
from .inference import answer, describe_pictures, draw, draw_prompts, load, tell, user
from .refining import load_refiner, refine_drawn
from .scenes import SceneSource, render, sample_scene
from .scenes.edits import draw_edit

PROMPTS = (
    "a red circle",
    "a large blue square on a black background",
    "three green stars",
    "a yellow triangle and a purple cross",
    "a circle to the left of a square",
    "a cyan diamond above an orange circle",
    "two pink crosses on a gray background",
    "four blue triangles",
)
QUESTIONS = ("how many objects are there?", "what color is the background?")
EDITS = 8
RIDDLE = "as many red circles as one plus two"
STORY = "tell a story of a small red circle in three pictures"
REFINED = "a yellow triangle and a purple cross"
WORDS = (
    'the word "OPEN" in green on a white background',
    'the word "HELLO" in red on a gray background',
    'the word "SUN" in yellow on a black background',
    'the word "2026" in blue on a white background',
    'the word "FROG" in purple on a gray background',
    'the word "A1" in orange on a black background',
    'a word "TRAIN" in pink on a white background',
    'draw the word "SKY" in cyan on a black background',
)
SEEDS = 4
_TILE, _MARGIN, _CAPTION = 128, 8, 34


def run_demo(folder: Path) -> None:
    """Write `contact_sheet.png`, `sharpening.gif` and the described pictures to `folder`, and say where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, processor = load("mini")

    # 1. Eight prompts, four seeds each.
    pictures = draw_prompts(
        model, processor, [p for p in PROMPTS for _ in range(SEEDS)], [s for _ in PROMPTS for s in range(SEEDS)]
    )
    columns = [pictures[i * SEEDS : (i + 1) * SEEDS] for i in range(len(PROMPTS))]
    save_picture(contact_sheet(PROMPTS, columns), folder / "contact_sheet.png")

    # 2. One picture after every scale.
    frames: list[Image.Image] = []
    prompt = PROMPTS[3]

    def keep(step):
        frames.extend(processor.post_process_multimodal_output(step.preview(), generation_mode="image"))

    draw_prompts(model, processor, [prompt], [0], callback_on_scale_end=keep)
    frames = [frame.resize((256, 256), Image.Resampling.NEAREST) for frame in frames]
    write_whole(
        folder / "sharpening.gif",
        lambda file: frames[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=[500] * (len(frames) - 1) + [2000],
            loop=0,
        ),
    )

    # 3. What the model reads in pictures it has not drawn.
    source = SceneSource((64, 64), 4, seed=123, split="test")
    pictures = [Image.fromarray(source.image(index)) for index in range(len(source))]
    for index, (picture, said) in enumerate(zip(pictures, describe_pictures(model, processor, pictures))):
        path = folder / f"described-{index}.png"
        save_picture(picture.resize((256, 256), Image.Resampling.NEAREST), path)
        print(f"{path}: {said}")
    for question in QUESTIONS:
        for index, said in enumerate(answer(model, processor, [[user(picture, question)] for picture in pictures])):
            print(f"{folder / f'described-{index}.png'}: {question} {said}")
    print(f"{folder / 'contact_sheet.png'}: {len(PROMPTS)} prompts x {SEEDS} seeds")
    print(f"{folder / 'sharpening.gif'}: {prompt!r}, scale by scale")

    # 4. Pictures of unseen combinations, changed as an instruction says.
    rng = np.random.default_rng(1)
    edits = []
    while len(edits) < EDITS:
        own = draw_edit(sample_scene(rng, "test", arrangement="placed"), rng, trained=False)
        edits += [] if own is None else [own]
    befores = [Image.fromarray(render(own.before, (64, 64))) for own in edits]
    afters = draw(
        model,
        processor,
        [[user(*pair)] for pair in zip(befores, [own.text for own in edits])],
        range(EDITS),
    )
    sheet = contact_sheet([own.text for own in edits], list(zip(befores, afters)))
    save_picture(sheet, folder / "edits.png")
    print(f"{folder / 'edits.png'}: given pictures above, edited ones below")

    # 5. A riddle that is thought through, and a story.
    (parts,) = tell(model, processor, [[user(RIDDLE)]], [0], enable_thinking=True, max_images=1)
    _write(RIDDLE, parts, folder / "riddle")
    (parts,) = tell(model, processor, [[user(STORY)]], [0])
    _write(STORY, parts, folder / "story")

    # 6. One picture as the tokenizer's decoder paints it, and as the refiner does at twice the size.
    refiner = load_refiner("mini", model)
    (plain,) = draw_prompts(model, processor, [REFINED], [0])
    (large,) = draw_prompts(
        model,
        processor,
        [REFINED],
        [0],
        refine=lambda output, seeds: refine_drawn(refiner, output, [REFINED], seeds, upsampling=2),
    )
    pair = [own.resize((256, 256), Image.Resampling.NEAREST) for own in (plain, large)]
    save_picture(Image.fromarray(np.concatenate([np.asarray(own) for own in pair], axis=1)), folder / "refined.png")
    print(f"{folder / 'refined.png'}: {REFINED!r}, drawn, and refined to twice the size")

    # 7. Words, by the checkpoint that draws nothing else.
    writer, its_processor = load("mini-words")
    written = draw_prompts(writer, its_processor, list(WORDS), [0] * len(WORDS))
    save_picture(tiled(written, columns=4), folder / "words.png")
    print(f"{folder / 'words.png'}: {', '.join(WORDS)}")

    # 8. Twice the side, by the checkpoint that goes on where mini's scales end.
    larger, its_processor = load("mini-128")
    drawn = draw_prompts(larger, its_processor, list(PROMPTS), [0] * len(PROMPTS))
    save_picture(tiled(drawn, columns=4, factor=1), folder / "larger.png")
    print(f"{folder / 'larger.png'}: {', '.join(PROMPTS)}")


def _write(prompt: str, parts: list, folder: Path) -> None:
    """As `write_story`, in place of what an earlier demo left."""
    (folder / "story.md").unlink(missing_ok=True)
    print(f"{write_story(prompt, parts, folder)[0]}: {prompt!r}")


def tiled(pictures: list[Image.Image], columns: int, factor: int = 2) -> Image.Image:
    """Pictures of one size side by side in rows, `factor` times as large."""
    rows = [np.concatenate(pictures[first : first + columns], axis=1) for first in range(0, len(pictures), columns)]
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((factor * sheet.width, factor * sheet.height), Image.Resampling.NEAREST)


def contact_sheet(prompts, columns) -> Image.Image:
    """Pictures in columns under their prompts."""
    width = _MARGIN + len(columns) * (_TILE + _MARGIN)
    sheet = Image.new("RGB", (width, _CAPTION + _MARGIN + len(columns[0]) * (_TILE + _MARGIN)), (235, 235, 235))
    canvas = ImageDraw.Draw(sheet)
    for column, (prompt, pictures) in enumerate(zip(prompts, columns)):
        left = _MARGIN + column * (_TILE + _MARGIN)
        canvas.multiline_text((left, 4), _wrap(prompt), fill=(0, 0, 0), spacing=1)
        for row, picture in enumerate(pictures):
            tile = picture.resize((_TILE, _TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, _CAPTION + _MARGIN + row * (_TILE + _MARGIN)))
    return sheet


def _wrap(text: str, width: int = 22) -> str:
    lines = [""]
    for word in text.split():
        lines = [*lines, word] if len(lines[-1]) + len(word) > width else [*lines[:-1], f"{lines[-1]} {word}".strip()]
    return "\n".join(lines)
