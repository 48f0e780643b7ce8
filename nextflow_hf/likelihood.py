"""How likely a model finds an answer, in words or as a picture: one teacher-forced pass instead of a draw."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .inference import Conversation, prepare
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .processing.processing_nextflow import NextFlowProcessor


@torch.no_grad()
def answer_log_probs(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    batch_size: int = 64,
    resolution: int | None = None,
    goes_on: bool = False,
    **template,
) -> torch.Tensor:
    """Log-probability in nats of the words that end each conversation, and of nothing more: `(conversations,)`.

    Args:
        model: The model.
        processor: Its processor.
        conversations: Turns as chat templates know them, of which the last is the assistant's and of text alone.
        batch_size: Conversations at a time.
        resolution: Level at which the model looks at pictures; the processor's by default.
        goes_on: Whether more may follow the words, of which nothing is asked.
        template: What the chat template knows. With `enable_thinking` the words are what follows the opening tag.

    Raises:
        ValueError: If the last turn is not an assistant's in words.
    """
    found = []
    for first in tqdm(range(0, len(conversations), batch_size), desc="score words", leave=False):
        chosen = conversations[first : first + batch_size]
        tokenizer = processor.tokenizer
        end = [] if goes_on else [tokenizer.eos_token_id]
        answers = [
            torch.tensor([*tokenizer(_words_of(own[-1]), add_special_tokens=False).input_ids, *end], dtype=torch.long)
            for own in chosen
        ]
        inputs = prepare(processor, [own[:-1] for own in chosen], resolution, **template).to(model.device)
        answers = pad_sequence(answers, batch_first=True, padding_value=-1).to(model.device)
        ids, mask = _continued(processor, inputs, answers)
        # A token is scored at the position before it.
        scored = torch.full_like(ids, -100)
        scored[:, -answers.shape[1] - 1 : -1] = answers.masked_fill(answers < 0, -100)
        inputs.update(input_ids=ids, attention_mask=mask)
        log_probs = model(**inputs, use_cache=False, scored_tokens=scored, score_drawing=False).token_log_probs
        found.append(torch.zeros_like(answers, dtype=log_probs.dtype).masked_scatter(answers >= 0, log_probs).sum(1))
    return torch.cat(found)


@torch.no_grad()
def picture_log_probs(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    conversations: Sequence[Conversation],
    batch_size: int = 64,
    resolution: int | None = None,
) -> torch.Tensor:
    """Log-probability in nats of the codes of the picture that ends each conversation: `(conversations,)`.

    As the model would draw it without guidance, temperature or nucleus. Sums over all scales, so that pictures of one
    size can be compared, and what may be said of one picture best of all.

    Args:
        model: The model.
        processor: Its processor.
        conversations: Turns as chat templates know them, of which the last is the assistant's and one picture.
        batch_size: Conversations at a time.
        resolution: Level at which pictures are encoded; the processor's by default.

    Raises:
        ValueError: If the last turn is not an assistant's of one picture.
    """
    config, found = model.config, []
    for first in tqdm(range(0, len(conversations), batch_size), desc="score pictures", leave=False):
        chosen = conversations[first : first + batch_size]
        prompts = prepare(processor, [own[:-1] for own in chosen], resolution).to(model.device)
        drawn = prepare(processor, [[_shown(own[-1])] for own in chosen], resolution).to(model.device)
        codes, grids = _encoded(model, drawn)
        slots = [torch.full_like(own, config.image_token_id) for own in codes]
        for own in slots:
            own[0] = config.boi_token_id
        slots = pad_sequence(slots, batch_first=True, padding_value=-1)
        # Pictures of the prompts stand before their row's own, and are not scored.
        seen = iter(zip(*_encoded(model, prompts)))
        all_codes, all_grids, scored = [], [], []
        for row, number in enumerate((prompts["input_ids"] == config.boi_token_id).sum(dim=1).tolist()):
            for own, its_grids in [*(next(seen) for _ in range(number)), (codes[row], grids[row])]:
                all_codes.append(own)
                all_grids.append(its_grids)
                scored.append(torch.full_like(own, -100))
            scored[-1] = codes[row]
        ids, mask = _continued(processor, prompts, slots)
        log_probs = model(
            input_ids=ids,
            attention_mask=mask,
            image_codes=pad_sequence(all_codes, batch_first=True, padding_value=-1),
            image_grids=pad_sequence(all_grids, batch_first=True),
            scored_codes=pad_sequence(scored, batch_first=True, padding_value=-100),
            use_cache=False,
        ).code_log_probs
        found.append(torch.stack([own.sum() for own in log_probs.split([len(own) for own in codes])]))
    return torch.cat(found)


def _continued(processor: NextFlowProcessor, inputs, more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of prompts and of what goes on from them, in which -1 pads at the right."""
    given = more >= 0
    ids = torch.cat([inputs["input_ids"], more.masked_fill(~given, processor.tokenizer.pad_token_id)], dim=1)
    return ids, torch.cat([inputs["attention_mask"], given.to(inputs["attention_mask"].dtype)], dim=1)


def _encoded(model: NextFlowForConditionalGeneration, inputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and grids of each picture among the inputs."""
    if "pixel_values" not in inputs:
        return [], []
    codes, grids = model.model.encode_images(inputs["pixel_values"], inputs.get("image_grids"))
    return [own[own >= 0] for own in codes], [torch.tensor(own, device=codes.device) for own in grids]


def _words_of(turn: dict) -> str:
    content = turn["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if turn["role"] != "assistant" or not all("text" in part for part in parts):
        raise ValueError("The words that are scored are an assistant's turn of text alone, at the conversation's end.")
    return "".join(part["text"] for part in parts)


def _shown(turn: dict) -> dict:
    """The user's turn that shows what an assistant drew."""
    content = turn["content"]
    if turn["role"] != "assistant" or isinstance(content, str) or len(content) != 1 or "text" in content[0]:
        raise ValueError("The picture that is scored is an assistant's turn of its own, at the conversation's end.")
    return {**turn, "role": "user"}
