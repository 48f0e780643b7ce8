"""Seeing and editing by way of words: what a model says of pictures takes their place, and text does the rest.

A model describes what it is shown, goes on in text alone, and draws the prompt that the text comes to. Adapters (LoRA)
may teach it to look and to think: each is on for its part and off while the model draws, so what the model draws and
answers at once stays as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import PurePosixPath

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from PIL import Image
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, logging

from . import ADAPTERS
from .conversations import DESCRIPTION, SHOWN, in_words
from .inference import Conversation, answer, assistant, draw, fit_to_trained, own_resolution, prepare, user
from .likelihood import answer_log_probs, picture_log_probs
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .processing.image_processing_base_nextflow import to_rgb
from .processing.processing_nextflow import THINK_CLOSING, THINK_OPENING, NextFlowProcessor
from .scenes import WHOLE_QUESTION
from .scenes.captions import NOTHING
from .scenes.tasks import COMPARE_QUESTION

# Names of the adapters that are switched on for looking at pictures, and for thinking in words. As PEFT saves several,
# the second lies in a folder of its name beside the first.
LOOK, THINK = "look", "think"
# Descriptions of a picture, and pictures of a prompt, of which one is kept.
GUESSES, DRAFTS = 6, 8
# What drawing counts beside reading where one is chosen (see `docs/abilities.md` for what it was chosen by).
_DRAWN_WEIGHT = 0.05
# What the check of a change by the other way round counts beside it, and the least that it counts as.
_CHECK_WEIGHT, _CHECK_FLOOR = 0.3, -10.0


def adapter_for(checkpoint: str, adapter: str | None = None) -> str | None:
    """The adapter that is asked for, or the bundled one of a bundled checkpoint; `None` where there is neither."""
    return adapter or (checkpoint if checkpoint in ADAPTERS else None)


def add_adapter(model: NextFlowForConditionalGeneration, adapter: str) -> None:
    """Give a model the adapter with which it looks, and thinks in words; it stays off but for that.

    If there is another one in its folder `think`, that is for the thinking, and the first for looking at pictures. How
    drafts are drawn in words stands in the adapter's own `generation_config.json`, if it has one, and whether a
    thought comes before an answer (`enable_thinking`) in that of the one that thinks.

    Args:
        model: The model that the adapter was trained for.
        adapter: A name of `ADAPTERS`, a folder or a Hub id.

    Raises:
        ValueError: If the model has one already, or the adapter is that of a model of another shape or not whole.
    """
    if {LOOK, THINK} & set(getattr(model, "peft_config", {})):
        raise ValueError(f"An adapter for looking already exists in this model; load it anew for {adapter!r}.")
    path = ADAPTERS.get(adapter, adapter)
    thinks = cached_file(path, f"{THINK}/{ADAPTER_CONFIG_NAME}", _raise_exceptions_for_missing_entries=False)
    folders = {LOOK: ""} if thinks is None else {LOOK: "", THINK: THINK}
    try:
        for name, folder in folders.items():
            # Of the second it would be reported that all weights of the first are missing.
            with _quiet():
                loaded = model.load_adapter(path, adapter_name=name, adapter_kwargs={"subfolder": folder})
            missing = sorted(key for key in loaded.missing_keys if f".{name}." in key)
            if missing:
                raise ValueError(
                    f"The adapter {adapter!r} lacks {len(missing)} of its weights, such as {missing[0]!r}."
                )
    except Exception as error:
        added = [name for name in folders if name in getattr(model, "peft_config", {})]
        if added:
            model.delete_adapter(added)
        if isinstance(error, RuntimeError):
            message = f"The adapter {adapter!r} was trained for a model of another shape than this one."
            raise ValueError(message) from error
        raise
    model.disable_adapters()
    model.drafting = _settings_of(path)
    model.thinks_in_words = bool(getattr(_settings_of(path, folder), "enable_thinking", False))


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _settings_of(path: str, folder: str = "") -> GenerationConfig | None:
    try:
        # A `subfolder` is not looked into where the path is a folder here.
        return GenerationConfig.from_pretrained(path, str(PurePosixPath(folder, GENERATION_CONFIG_NAME)))
    except OSError:
        return None


@contextmanager
def looking(model: NextFlowForConditionalGeneration, adapter: str = LOOK) -> Iterator[None]:
    """The model with its adapter for looking on, where it has been given one."""
    if adapter not in getattr(model, "peft_config", {}):
        yield
        return
    known = model.config.abilities
    model.set_adapter(adapter)
    model.enable_adapters()
    model.config.abilities = None if known is None else sorted({*known, "text", "caption"})
    try:
        yield
    finally:
        model.config.abilities = known
        model.disable_adapters()


def thinking(model: NextFlowForConditionalGeneration) -> AbstractContextManager[None]:
    """The model with its adapter for thinking in words on, which may be the one for looking."""
    return looking(model, THINK if THINK in getattr(model, "peft_config", {}) else LOOK)


def look(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    batch_size: int = 64,
    resolution: int | None = None,
    question: str = WHOLE_QUESTION,
    guesses: int = GUESSES,
) -> list[Conversation]:
    """Conversations in words ([`conversations.in_words`]): the model describes each of their pictures by itself.

    Of several guesses at what a picture shows, a model that draws tells the right one by what it would have drawn: the
    greatest log p(words | picture) + 0.05 log p(picture | words), a noisy channel (Yee et al., arXiv 1908.05731). So
    what it has never seen together is read as well as it is drawn.

    Args:
        model: The model.
        processor: Its processor.
        conversations: Turns as chat templates know them. A picture whose part of a turn has a `description`, as those
            of [`reply_in_words`] have, is not looked at, but taken for what that says.
        batch_size: Pictures, or guesses at them, at a time.
        resolution: Level at which the model looks at pictures; the processor's by default.
        question: Asks for everything that a picture shows.
        guesses: Likeliest descriptions of a picture (beam search) of which one is chosen. With 1, and of a model that
            does not draw, the likeliest word after word.

    Raises:
        ValueError: If there is less than one guess.
    """
    if guesses < 1:
        raise ValueError(f"At least one guess is made at each picture, got guesses={guesses}.")
    shown = [_pictures(own) for own in conversations]
    left = [part for parts in shown for part in parts if DESCRIPTION not in part]
    ask = {"type": "text", "text": question}
    asked = [[{"role": "user", "content": [part, ask]}] for part in left]
    if guesses == 1 or "image" not in (model.config.abilities or ["image"]):
        with looking(model):
            said = answer(model, processor, asked, batch_size, resolution)
    else:
        said = []
        step = max(1, batch_size // guesses)
        for first in tqdm(range(0, len(asked), step), desc="look"):
            chosen = slice(first, first + step)
            said += _read(model, processor, asked[chosen], left[chosen], batch_size, resolution, guesses)
    said = iter(said)
    return [
        in_words(own, [part[DESCRIPTION] if DESCRIPTION in part else next(said).strip() for part in parts])
        for own, parts in zip(conversations, shown)
    ]


def guess(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    guesses: int,
    resolution: int | None = None,
    max_new_tokens: int = 80,
    **template,
) -> tuple[list[str], torch.Tensor]:
    """The likeliest answers to each conversation by beam search, and their log-probabilities in nats: `(conversations *
    guesses,)` each, the guesses at one conversation side by side, best first. `template` goes to the chat template."""
    inputs = prepare(processor, conversations, resolution, **template).to(model.device)
    beams = {"num_beams": guesses, "num_return_sequences": guesses, "length_penalty": 0.0, "output_scores": True}
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **(beams if guesses > 1 else {}),
    )
    scores = output.sequences_scores if guesses > 1 else torch.zeros(len(conversations), device=model.device)
    said = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [own.strip() for own in said], scores


def _read(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    asked: Sequence[Conversation],
    shown: Sequence[dict],
    batch_size: int,
    resolution: int | None,
    guesses: int,
) -> list[str]:
    """Of the guesses at each picture, the one that goes best with how it would be drawn."""
    with looking(model):
        said, scores = guess(model, processor, asked, guesses, resolution)
    # Nothing can be drawn of no words.
    rows = [row for row, text in enumerate(said) if text]
    drawn = [[user(said[row]), {"role": "assistant", "content": [shown[row // guesses]]}] for row in rows]
    chosen = torch.full_like(scores, float("-inf"))
    if rows:
        fits = picture_log_probs(model, processor, drawn, batch_size, resolution)
        chosen[rows] = scores[rows] + _DRAWN_WEIGHT * fits
    best = chosen.view(-1, guesses).argmax(dim=1).tolist()
    return [said[index * guesses + own] for index, own in enumerate(best)]


def answer_in_words(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    batch_size: int = 64,
    resolution: int | None = None,
    max_new_tokens: int = 200,
    guesses: int = GUESSES,
) -> list[str]:
    """Answers as by `inference.answer` to conversations in which the model has first put its own words for pictures
    ([`look`], which makes `guesses` at each).

    What would be answered by a picture is answered by its prompt. A thought before it is left out.
    """
    told = look(model, processor, conversations, batch_size, resolution, guesses=guesses)
    return [words for _, words in think_and_answer(model, processor, told, batch_size, max_new_tokens, guesses)]


def think_and_answer(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    told: Sequence[Conversation],
    batch_size: int = 64,
    max_new_tokens: int = 200,
    guesses: int = GUESSES,
) -> list[tuple[str, str]]:
    """A thought in its tags and the answer after it, to each of the conversations in words ([`look`]).

    Of a model that was not trained to think the thoughts are empty, and the likeliest words the answer. Else so many
    guesses at thought and answer are checked against the other way round, a noisy channel once more: what changes a
    picture by what is asked, by whether a comparison of the two would find that change; what tells two pictures apart,
    by whether it would make the second of the first. The greatest sum of log-probabilities is taken, that of the check
    counted 0.3 and no lower than -10: where nothing passes, nothing was to be checked.
    """
    with thinking(model):
        # An answer that has begun goes on, with the thought that is there.
        has_begun = any(talk and talk[-1]["role"] == "assistant" for talk in told)
        if has_begun or not _thinks(model):
            said = answer(model, processor, told, batch_size, max_new_tokens=max_new_tokens)
            return [("", words.strip()) for words in said]
        found = []
        step = max(1, batch_size // guesses)
        for first in tqdm(range(0, len(told), step), desc="think"):
            talks = told[first : first + step]
            said, scores = guess(model, processor, talks, guesses, max_new_tokens=max_new_tokens, enable_thinking=True)
            split = [_split(own) for own in said]
            checks = _checks(model, processor, [talk for talk in talks for _ in range(guesses)], split, batch_size)
            best = (scores + _CHECK_WEIGHT * checks).view(-1, guesses).argmax(dim=1).tolist()
            found += [split[row * guesses + own] for row, own in enumerate(best)]
    return [(THINK_OPENING + thought, words) for thought, words in found]


def _thinks(model: NextFlowForConditionalGeneration) -> bool:
    """Whether thoughts come before answers in words: by its adapter, or of a whole checkpoint by its own settings."""
    return getattr(model, "thinks_in_words", getattr(model.generation_config, "enable_thinking", False))


def _split(said: str) -> tuple[str, str]:
    """The rest of a thought, which is closed where it has no end, and the words after it."""
    thought, _, words = said.partition(THINK_CLOSING.strip())
    return f"{thought.strip()}\n{THINK_CLOSING}", words.strip()


def _checks(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    talks: Sequence[Conversation],
    split: Sequence[tuple[str, str]],
    batch_size: int,
) -> torch.Tensor:
    """Log-probabilities in nats of the other way round, 0 where there is none: `(conversations,)`."""
    reverse, checks = {}, torch.zeros(len(split), device=model.device)
    for row, (talk, (thought, words)) in enumerate(zip(talks, split)):
        *_, shown = described = [[part[DESCRIPTION] for part in _parts(turn) if DESCRIPTION in part] for turn in talk]
        known = [own for turn in described for own in turn]
        if not words:
            # Nothing said is no answer.
            checks[row] = float("-inf")
        elif not known or len(shown) > 2:
            continue
        elif len(shown) == 2 and words == NOTHING:
            # No change leaves all as it was.
            checks[row] = 0.0 if shown[0] == shown[1] else _CHECK_FLOOR
        elif len(shown) == 2:
            reverse[row] = [user(SHOWN.format(shown[0]), words), assistant(thought + shown[1])]
        else:
            pictures = map(SHOWN.format, (known[-1], words))
            reverse[row] = [user(*pictures, COMPARE_QUESTION), assistant(thought)]
    if reverse:
        scores = answer_log_probs(
            model, processor, list(reverse.values()), batch_size, goes_on=True, enable_thinking=True
        )
        checks[list(reverse)] = scores.float().clamp(min=_CHECK_FLOOR)
    return checks


def reply_in_words(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    seeds: Sequence[int],
    batch_size: int = 64,
    resolution: int | None = None,
    drafts: int = DRAFTS,
    guesses: int = GUESSES,
    max_new_tokens: int = 200,
    **sampling,
) -> list[dict]:
    """The assistant's turns that answer conversations with a picture each, by way of words: from the prompt that the
    model comes to in text.

    Nothing of a given picture reaches the new one but what the model says of it ([`look`], which makes `guesses`). So
    many `drafts` are drawn of each prompt, and the one that goes best with it is kept, told as [`look`] tells guesses.
    The prompt stays with the picture as its `description`, and the thought that led to it before it, so that a
    conversation goes on from what was meant: the picture need not be read again, and what went wrong in drawing it does
    not add up over the turns. `sampling` goes to `generate`, before what the adapter says ([`add_adapter`]).

    Raises:
        ValueError: If there is less than one draft, or the model comes to no words for a conversation.
    """
    if drafts < 1:
        raise ValueError(f"At least one draft is drawn of each picture, got drafts={drafts}.")
    told = look(model, processor, conversations, batch_size, resolution, guesses=guesses)
    said = think_and_answer(model, processor, told, batch_size, max_new_tokens, guesses)
    thoughts, prompts = [thought for thought, _ in said], [words for _, words in said]
    if not all(prompts):
        raise ValueError(
            f"The model comes to no words for conversation {prompts.index('')} in {max_new_tokens} tokens, so there is "
            "nothing to draw in words. Has it learned to (`add_adapter`)? If so, raise `max_new_tokens`."
        )
    if getattr(model, "drafting", None) is not None:
        sampling = {"generation_config": model.drafting, **sampling}
    pictures = []
    for first in range(0, len(prompts), batch_size):
        chosen = slice(first, first + batch_size)
        best = {}
        if drafts > 1:
            scorer = partial(_fitness, model, processor, prompts[chosen], resolution)
            best = {"best_of": drafts, "scorer": scorer}
        asked = [[user(own)] for own in prompts[chosen]]
        pictures += draw(model, processor, asked, seeds[chosen], batch_size, resolution, **best, **sampling)
    turns = []
    for thought, prompt, picture in zip(thoughts, prompts, pictures):
        turn = assistant(*([thought] if thought else []), picture)
        turn["content"][-1][DESCRIPTION] = prompt
        turns.append(turn)
    return turns


def draw_in_words(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    seeds: Sequence[int],
    **options,
) -> list[Image.Image]:
    """Pictures as by `inference.draw`, by way of words: those of [`reply_in_words`], which takes the `options`."""
    turns = reply_in_words(model, processor, conversations, seeds, **options)
    return [turn["content"][-1]["image"] for turn in turns]


def edit_in_words(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    picture: Image.Image,
    instruction: str,
    seed: int = 0,
    drafts: int = DRAFTS,
    **sampling,
) -> Image.Image:
    """A picture changed by an instruction as by `inference.edit_picture`, but described, changed in words, and drawn
    anew ([`draw_in_words`])."""
    picture = fit_to_trained(model, to_rgb(picture))
    settings = {"image_size": (picture.height, picture.width), **sampling}
    resolution = own_resolution(model, picture)
    conversations = [[user(picture, instruction)]]
    return draw_in_words(model, processor, conversations, [seed], resolution=resolution, drafts=drafts, **settings)[0]


def _fitness(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    prompts: Sequence[str],
    resolution: int | None,
    pictures: Sequence[torch.Tensor],
) -> list[float]:
    """How well pictures in [-1, 1] go with their prompts: log p(prompt | picture) + 0.05 log p(picture | prompt)."""
    shown = processor.post_process_multimodal_output(pictures, generation_mode="image")
    read = [[user(own, WHOLE_QUESTION), assistant(prompt)] for own, prompt in zip(shown, prompts)]
    drawn = [[user(prompt), assistant(own)] for own, prompt in zip(shown, prompts)]
    with looking(model):
        scores = answer_log_probs(model, processor, read, resolution=resolution)
    return (scores + _DRAWN_WEIGHT * picture_log_probs(model, processor, drawn, resolution=resolution)).tolist()


def _pictures(conversation: Conversation) -> list[dict]:
    return [part for turn in conversation for part in _parts(turn) if "text" not in part]


def _parts(turn: dict) -> list[dict]:
    """The parts of a turn; none of one that is a text."""
    return [] if isinstance(turn["content"], str) else turn["content"]
