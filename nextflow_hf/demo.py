"""`make demo`: draws a contact sheet, shows one picture sharpening scale by scale, and describes pictures."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .files import save_picture, write_whole
from .inference import describe_pictures, draw_prompts, load
from .scenes import SceneSource

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
    for index, (picture, answer) in enumerate(zip(pictures, describe_pictures(model, processor, pictures))):
        path = folder / f"described-{index}.png"
        save_picture(picture.resize((256, 256), Image.Resampling.NEAREST), path)
        print(f"{path}: {answer}")
    print(f"{folder / 'contact_sheet.png'}: {len(PROMPTS)} prompts x {SEEDS} seeds")
    print(f"{folder / 'sharpening.gif'}: {prompt!r}, scale by scale")


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
