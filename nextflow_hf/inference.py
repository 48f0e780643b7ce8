"""Loading a checkpoint, and answering conversations in words, pictures or both: what the command line, the demo and the
evaluation share."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor, BatchFeature

from . import BUNDLED
from .modeling.generation_nextflow import NextFlowImageOutput
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .processing.image_processing_base_nextflow import to_rgb
from .processing.processing_nextflow import THINK_CLOSING, THINK_OPENING, NextFlowProcessor
from .scenes import QUESTION

Conversation = list[dict]
# From this level on a mask is white: a lossy file has greys around what was drawn white.
_WHITE = 128


def load(
    checkpoint: str, device: str | torch.device | None = None
) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    """Model and processor of a checkpoint: a name of `BUNDLED`, a folder or a Hub id; on the accelerator, if there is
    one, or another `device`."""
    path = BUNDLED.get(checkpoint, checkpoint)
    model = AutoModelForMultimodalLM.from_pretrained(path).eval()
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device), AutoProcessor.from_pretrained(path)


def user(*parts) -> dict:
    """A user's turn of texts, pictures (PIL, array or tensor) and parts as chat templates know them, in order."""
    return {"role": "user", "content": list(map(_part, parts))}


def assistant(*parts) -> dict:
    """An assistant's turn of the same."""
    return {"role": "assistant", "content": list(map(_part, parts))}


def _part(own) -> dict:
    if isinstance(own, dict):
        return own
    return {"type": "text", "text": own} if isinstance(own, str) else {"type": "image", "image": own}


def prepare(
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    resolution: int | None = None,
    **template,
) -> BatchFeature:
    """Tensors of conversations that await an answer, or, where an assistant's words end them, the rest of one.

    Args:
        processor: The checkpoint's processor.
        conversations: Turns as chat templates know them.
        resolution: Level at which the model looks at pictures, as the side of a square one; the processor's by default.
        template: What the chat template knows, such as `enable_thinking`.

    Raises:
        ValueError: If there is an empty conversation, if some end with an assistant's turn and others do not, or if one
            that does cannot go on: after a picture, or with a thought, which is the beginning of a turn.
    """
    if not all(conversations):
        raise ValueError("A conversation has no turns.")
    endings = {own[-1]["role"] == "assistant" for own in conversations}
    if len(endings) > 1:
        raise ValueError("Either all conversations or none may end with an assistant's turn, which then goes on.")
    goes_on = endings == {True}
    if goes_on and template.get("enable_thinking"):
        raise ValueError("A thought begins an answer; these conversations end with one that has begun.")
    if goes_on and any(_ends_with_picture(own[-1]["content"]) for own in conversations):
        raise ValueError("An answer goes on after words, not after a picture; end the conversation with a user's turn.")
    images = {} if resolution is None else {"processor_kwargs": {"images_kwargs": {"resolution": resolution}}}
    return processor.apply_chat_template(
        list(conversations),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        **images,
        **template,
    )


def _ends_with_picture(content: str | list[dict]) -> bool:
    return not isinstance(content, str) and bool(content) and "text" not in content[-1]


def draw(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    seeds: Sequence[int],
    batch_size: int = 64,
    resolution: int | None = None,
    refine: Callable[[NextFlowImageOutput, Sequence[int]], list[Image.Image]] | None = None,
    **sampling,
) -> list[Image.Image]:
    """One picture answers each conversation, each from its own seed; `sampling` goes to `generate`.

    `refine` makes pictures of what `generate` gives and the seeds, in place of the tokenizer's decoder.
    """
    pictures = []
    for first in tqdm(range(0, len(conversations), batch_size), desc="draw"):
        chosen = slice(first, first + batch_size)
        inputs = prepare(processor, conversations[chosen], resolution).to(model.device)
        output = model.generate(**inputs, generation_mode="image", seed=list(seeds[chosen]), **sampling)
        if refine is not None:
            pictures += refine(output, seeds[chosen])
            continue
        pictures += processor.post_process_multimodal_output(output, generation_mode="image")
    return pictures


def answer(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    batch_size: int = 64,
    resolution: int | None = None,
    max_new_tokens: int = 80,
) -> list[str]:
    """The model's likeliest words in answer to each conversation."""
    answers = []
    for first in tqdm(range(0, len(conversations), batch_size), desc="answer"):
        inputs = prepare(processor, conversations[first : first + batch_size], resolution).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def think(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    batch_size: int = 64,
    resolution: int | None = None,
    max_new_tokens: int = 160,
) -> list[str]:
    """The model's likeliest thought before it answers each conversation, with its opening and closing tags.

    Conversations that end with `assistant(thought)` are gone on with by [`draw`] and [`answer`]. A thought without an
    end after `max_new_tokens` is closed there.
    """
    closing = THINK_CLOSING.strip()
    thoughts = []
    for first in tqdm(range(0, len(conversations), batch_size), desc="think"):
        chosen = conversations[first : first + batch_size]
        inputs = prepare(processor, chosen, resolution, enable_thinking=True).to(model.device)
        output = model.generate(
            **inputs,
            generation_mode="interleaved",
            max_images=0,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_strings=[closing],
            tokenizer=processor.tokenizer,
        )
        said = [processor.decode(torch.cat(own), skip_special_tokens=True) if own else "" for own in output.segments]
        thoughts += [f"{THINK_OPENING}{text.partition(closing)[0].strip()}\n{THINK_CLOSING}" for text in said]
    return thoughts


def tell(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    seeds: Sequence[int],
    enable_thinking: bool = False,
    resolution: int | None = None,
    **generation,
) -> list[list[str | Image.Image]]:
    """Text and pictures in turn answer each conversation.

    Args:
        model: The model.
        processor: Its processor.
        conversations: Turns as chat templates know them.
        seeds: A seed for the pictures of each.
        enable_thinking: Whether the model first writes down a thought; the answer then begins with its opening tag.
        resolution: Level at which the model looks at pictures; the processor's by default.
        generation: Goes to `generate`, such as `image_size` and `max_images`.
    """
    answers = []
    for conversation, seed in zip(tqdm(conversations, desc="tell"), seeds, strict=True):
        inputs = prepare(processor, [conversation], resolution, enable_thinking=enable_thinking).to(model.device)
        output = model.generate(**inputs, generation_mode="interleaved", seed=seed, do_sample=False, **generation)
        (parts,) = processor.post_process_multimodal_output(output, generation_mode="interleaved")
        if enable_thinking:
            # The prompt ended with it, so it was not generated; the turn is not whole without it.
            is_text = bool(parts) and isinstance(parts[0], str)
            parts = [THINK_OPENING + parts[0], *parts[1:]] if is_text else [THINK_OPENING, *parts]
        answers.append(parts)
    return answers


def draw_prompts(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    prompts: list[str],
    seeds: list[int],
    batch_size: int = 64,
    negative_prompt: str | None = None,
    **sampling,
) -> list[Image.Image]:
    """One picture per prompt, each from its own seed, away from `negative_prompt`; `sampling` goes to `generate`."""
    if negative_prompt is not None:
        negative = prepare(processor, [[user(negative_prompt)]]).to(model.device)
        sampling["negative_prompt_ids"] = negative["input_ids"]
        sampling["negative_prompt_attention_mask"] = negative["attention_mask"]
    return draw(model, processor, [[user(text)] for text in prompts], seeds, batch_size, **sampling)


def describe_pictures(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    pictures: list,
    question: str = QUESTION,
    batch_size: int = 64,
) -> list[str]:
    """The model's likeliest answer to a question about each picture (PIL, array or tensor)."""
    return answer(model, processor, [[user(own, question)] for own in pictures], batch_size)


def edit_picture(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    picture: Image.Image,
    instruction: str,
    mask: Image.Image | None = None,
    seed: int = 0,
    enable_thinking: bool = False,
    **sampling,
) -> Image.Image:
    """Change a picture by an instruction.

    Args:
        model: The model.
        processor: Its processor.
        picture: The picture. One of a size that the model was not trained for is first brought to the nearest such
            size: scaled to cover it, and cropped at the centre.
        instruction: What to do.
        mask: White (128 and more) where the picture may change, of the picture's own size; what is transparent is
            black. Pixels further from it than one cell of the finest scale are kept exactly.
        seed: Seed of what is drawn.
        enable_thinking: Whether the model first writes down what is to be drawn.
        sampling: Goes to `generate`.

    Raises:
        ValueError: If the mask has another size than the picture, or nothing white is left of it.
    """
    picture = to_rgb(picture)
    if mask is not None:
        if mask.size != picture.size:
            raise ValueError(f"The mask has {mask.size} pixels (width, height), the picture {picture.size}.")
        mask = to_rgb(mask, background="black").convert("L")
        mask = fit_to_trained(model, mask, Image.Resampling.NEAREST)
        if mask.getextrema()[1] < _WHITE:
            raise ValueError(
                "Nothing of the mask is white, or what is was cropped away with the picture's border: mark what may "
                f"change within the middle {mask.height}x{mask.width} part."
            )
    picture = fit_to_trained(model, picture)
    resolution = own_resolution(model, picture)
    conversation = [user(picture, instruction)]
    if enable_thinking:
        conversation.append(assistant(*think(model, processor, [conversation], resolution=resolution)))
    inputs = prepare(processor, [conversation], resolution).to(model.device)
    if mask is None:
        sampling["image_size"] = (picture.height, picture.width)
    else:
        sampling["mask"] = torch.from_numpy(np.array(mask)) >= _WHITE
    output = model.generate(**inputs, generation_mode="image", seed=seed, **sampling)
    return processor.post_process_multimodal_output(output, generation_mode="image")[0]


def place_on_canvas(picture: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """A picture in the middle of a larger one of (height, width), as large as fits, and the mask of what is new there.

    With [`edit_picture`] the rest is drawn: another aspect ratio, or more of the scene.

    Raises:
        ValueError: If the picture would fill the canvas.
    """
    height, width = size
    picture = to_rgb(picture)
    scale = min(height / picture.height, width / picture.width, 1.0)
    inner = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    if inner.size == (width, height):
        raise ValueError(f"A picture of this shape fills {height}x{width} pixels; there is nothing to add.")
    border = [inner.getpixel((x, y)) for x in (0, inner.width - 1) for y in (0, inner.height - 1)]
    canvas = Image.new("RGB", (width, height), max(border, key=border.count))
    mask = Image.new("L", (width, height), 255)
    corner = ((width - inner.width) // 2, (height - inner.height) // 2)
    canvas.paste(inner, corner)
    mask.paste(0, (*corner, corner[0] + inner.width, corner[1] + inner.height))
    return canvas, mask


def check_trained_size(model: NextFlowForConditionalGeneration, size: tuple[int, int]) -> None:
    """Raise `ValueError` unless the model draws pictures of (height, width), before any work."""
    model.config.schedule.grids_for_size(*size)
    model._check_image_size(size)


def fit_to_trained(
    model: NextFlowForConditionalGeneration,
    picture: Image.Image,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """A picture at the nearest size that the model was trained for (by aspect ratio, then by area): scaled to cover it,
    and cropped at the centre. Without recorded sizes, the nearest multiple of the tokenizer's stride."""
    trained = model.config.trained_image_sizes
    step = model.config.schedule.downsample
    if not trained:
        height, width = (max(step, round(side / step) * step) for side in (picture.height, picture.width))
    else:
        height, width = min(
            trained,
            key=lambda own: (
                round(abs(math.log(own[0] / own[1] * picture.width / picture.height)), 6),
                abs(math.log(own[0] * own[1] / (picture.height * picture.width))),
            ),
        )
    if picture.size == (width, height):
        return picture
    return ImageOps.fit(picture, (width, height), resample)


def own_resolution(model: NextFlowForConditionalGeneration, picture: Image.Image) -> int:
    """Level of the schedule whose area is nearest to a picture's, as the side of a square one."""
    schedule = model.config.schedule
    return schedule.sides[schedule.level_for_size(picture.height, picture.width) - 1] * schedule.downsample
