"""Seeing and editing by way of words: what a model says of pictures takes their place, and text does the rest.

A model describes what it is shown, goes on in text alone, and draws the prompt that the text comes to. An adapter
(LoRA) may teach it the looking and thinking: it is on for these and off while the model draws, so what the model draws
and answers at once stays as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import partial

import torch
from PIL import Image

from . import ADAPTERS
from .conversations import in_words
from .inference import Conversation, answer, draw, fit_to_trained, own_resolution, user
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .processing.image_processing_base_nextflow import to_rgb
from .processing.processing_nextflow import NextFlowProcessor
from .scenes import WHOLE_QUESTION

# Name of the adapter that is switched on for looking and thinking.
ADAPTER = "look"
# Key of a picture's part of a turn: what it shows, where that is known.
DESCRIPTION = "description"


def adapter_for(checkpoint: str, adapter: str | None = None) -> str | None:
    """The adapter that is asked for, or the bundled one of a bundled checkpoint; `None` where there is neither."""
    return adapter or (checkpoint if checkpoint in ADAPTERS else None)


def add_adapter(model: NextFlowForConditionalGeneration, adapter: str) -> None:
    """Give a model the adapter with which it looks and thinks in words; it stays off but for that.

    Args:
        model: The model that the adapter was trained for.
        adapter: A name of `ADAPTERS`, a folder or a Hub id.

    Raises:
        ValueError: If the model has one already, or the adapter is that of a model of another shape.
    """
    try:
        model.load_adapter(ADAPTERS.get(adapter, adapter), adapter_name=ADAPTER)
    except RuntimeError as error:
        model.delete_adapter(ADAPTER)
        raise ValueError(f"The adapter {adapter!r} was trained for a model of another shape than this one.") from error
    model.disable_adapters()


@contextmanager
def looking(model: NextFlowForConditionalGeneration) -> Iterator[None]:
    """The model with its adapter on, where it has been given one."""
    if ADAPTER not in getattr(model, "peft_config", {}):
        yield
        return
    known = model.config.abilities
    model.set_adapter(ADAPTER)
    model.enable_adapters()
    model.config.abilities = None if known is None else sorted({*known, "text", "caption"})
    try:
        yield
    finally:
        model.config.abilities = known
        model.disable_adapters()


def look(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    batch_size: int = 64,
    resolution: int | None = None,
    question: str = WHOLE_QUESTION,
) -> list[Conversation]:
    """Conversations in words ([`conversations.in_words`]): the model describes each of their pictures by itself.

    `question` asks for everything that a picture shows. A picture whose part of a turn has a `description`, as those of
    [`reply_in_words`] have, is not looked at, but taken for what that says.
    """
    shown = [_pictures(own) for own in conversations]
    ask = {"type": "text", "text": question}
    asked = [[{"role": "user", "content": [part, ask]}] for parts in shown for part in parts if DESCRIPTION not in part]
    with looking(model):
        said = iter(answer(model, processor, asked, batch_size, resolution))
    return [
        in_words(own, [part[DESCRIPTION] if DESCRIPTION in part else next(said).strip() for part in parts])
        for own, parts in zip(conversations, shown)
    ]


def answer_in_words(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    batch_size: int = 64,
    resolution: int | None = None,
    max_new_tokens: int = 80,
) -> list[str]:
    """Answers as by `inference.answer` to conversations in which the model has first put its own words for pictures.

    What would be answered by a picture is answered by its prompt.
    """
    told = look(model, processor, conversations, batch_size, resolution)
    with looking(model):
        said = answer(model, processor, told, batch_size, max_new_tokens=max_new_tokens)
    return [own.strip() for own in said]


def reply_in_words(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    seeds: Sequence[int],
    batch_size: int = 64,
    resolution: int | None = None,
    drafts: int = 1,
    **sampling,
) -> list[dict]:
    """The assistant's turns that answer conversations with a picture each, by way of words: from the prompt that the
    model comes to in text.

    Nothing of a given picture reaches the new one but what the model says of it. With `drafts`, so many are drawn of
    each prompt, the model looks at them, and the one that it describes most like the prompt is kept. The prompt stays
    with the picture as its `description`, so that a conversation goes on from what was meant: the picture need not be
    read again, and what went wrong in drawing it does not add up over the turns.

    Raises:
        ValueError: If there is less than one draft.
    """
    if drafts < 1:
        raise ValueError(f"At least one draft is drawn of each picture, got drafts={drafts}.")
    prompts = answer_in_words(model, processor, conversations, batch_size, resolution)
    pictures = []
    for first in range(0, len(prompts), batch_size):
        chosen = slice(first, first + batch_size)
        best = {}
        if drafts > 1:
            scorer = partial(_likeness, model, processor, prompts[chosen], resolution)
            best = {"best_of": drafts, "scorer": scorer}
        asked = [[user(own)] for own in prompts[chosen]]
        pictures += draw(model, processor, asked, seeds[chosen], batch_size, resolution, **best, **sampling)
    return [
        {"role": "assistant", "content": [{"type": "image", "image": picture, DESCRIPTION: prompt}]}
        for picture, prompt in zip(pictures, prompts)
    ]


def draw_in_words(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    seeds: Sequence[int],
    **options,
) -> list[Image.Image]:
    """Pictures as by `inference.draw`, by way of words: those of [`reply_in_words`], which takes the `options`."""
    turns = reply_in_words(model, processor, conversations, seeds, **options)
    return [turn["content"][0]["image"] for turn in turns]


def edit_in_words(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    picture: Image.Image,
    instruction: str,
    seed: int = 0,
    drafts: int = 1,
    **sampling,
) -> Image.Image:
    """A picture changed by an instruction as by `inference.edit_picture`, but described, changed in words, and drawn
    anew ([`draw_in_words`])."""
    picture = fit_to_trained(model, to_rgb(picture))
    settings = {"image_size": (picture.height, picture.width), **sampling}
    resolution = own_resolution(model, picture)
    conversations = [[user(picture, instruction)]]
    return draw_in_words(model, processor, conversations, [seed], resolution=resolution, drafts=drafts, **settings)[0]


def _likeness(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    prompts: Sequence[str],
    resolution: int | None,
    pictures: Sequence[torch.Tensor],
) -> list[float]:
    """Of pictures in [-1, 1], how much of the words of each prompt and of the model's description are shared."""
    shown = [Image.fromarray(((own + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()) for own in pictures]
    with looking(model):
        said = answer(model, processor, [[user(own, WHOLE_QUESTION)] for own in shown], resolution=resolution)
    return [SequenceMatcher(None, one.split(), own.split(), False).ratio() for one, own in zip(prompts, said)]


def _pictures(conversation: Conversation) -> list[dict]:
    contents = [turn["content"] for turn in conversation if not isinstance(turn["content"], str)]
    return [part for content in contents for part in content if "text" not in part]
