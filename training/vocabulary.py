"""A decoder that goes on with another text tokenizer."""

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling.modeling_nextflow import NextFlowForConditionalGeneration


@torch.no_grad()
def with_tokenizer(
    model: NextFlowForConditionalGeneration,
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    code_start_id: int,
) -> NextFlowForConditionalGeneration:
    """A copy of a decoder whose text tokens are those of another tokenizer; all else is kept.

    A token that both have keeps its embedding; another one begins as the mean of what the old tokenizer makes of its
    text. Codes move along.

    Args:
        model: The decoder.
        before: Its tokenizer.
        after: The tokenizer to go on with; its image tokens have the ids of the decoder's.
        code_start_id: Where the codes begin in the new vocabulary, at least as many as `after` has tokens.

    Raises:
        ValueError: If the codes would begin among the text tokens, or the image tokens have other ids.
    """
    config = model.config
    if code_start_id < len(after):
        raise ValueError(f"The tokenizer has {len(after)} tokens, but codes would begin at {code_start_id}.")
    for name in ("boi_token", "eoi_token", "image_token"):
        found, expected = getattr(after, f"{name}_id"), getattr(config, f"{name}_id")
        if found != expected:
            raise ValueError(f"The tokenizer's {name} has the id {found}, the decoder's {expected}.")
    codes = config.vq_config.codebook_size
    changed = type(config)(**{**config.to_dict(), "code_start_id": code_start_id})
    changed.text_config.vocab_size = code_start_id + codes
    new = NextFlowForConditionalGeneration(changed)
    state = model.state_dict()
    known = before.get_vocab()
    pieces = {
        index: [known[token]] if token in known else before(after.decode([index]), add_special_tokens=False).input_ids
        for token, index in after.get_vocab().items()
    }
    for name, fresh in new.state_dict().items():
        if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            continue
        old, rows = state[name], fresh.clone()
        for index, parts in pieces.items():
            if parts:
                rows[index] = old[parts].mean(dim=0)
        rows[code_start_id:] = old[config.code_start_id : config.code_start_id + codes]
        state[name] = rows
    new.load_state_dict(state)
    return new
