"""A decoder that goes on with another vocabulary: another text tokenizer, another image tokenizer, or both."""

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling.modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling.modeling_nextflow_vq import NextFlowVQModel


@torch.no_grad()
def with_vocabulary(
    model: NextFlowForConditionalGeneration,
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    vq_model: NextFlowVQModel,
    code_start_id: int,
) -> NextFlowForConditionalGeneration:
    """A copy of a decoder with other text tokens and codes; all other weights are kept.

    A token that both tokenizers have keeps its embedding; another one begins as the mean of what the old tokenizer
    makes of its text. A code begins as the nearest of the old codes.

    Args:
        model: The decoder, with its image tokenizer.
        before: Its text tokenizer.
        after: The text tokenizer to go on with; its image tokens have the ids of the decoder's.
        vq_model: The image tokenizer to go on with.
        code_start_id: Where the codes begin in the new vocabulary, at least as many as `after` has tokens.

    Raises:
        ValueError: If the codes would begin among the text tokens, the image tokens have other ids, or the codes have
            another width.
    """
    config = model.config
    if code_start_id < len(after):
        raise ValueError(f"The tokenizer has {len(after)} tokens, but codes would begin at {code_start_id}.")
    for name in ("boi_token", "eoi_token", "image_token"):
        found, expected = getattr(after, f"{name}_id"), getattr(config, f"{name}_id")
        if found != expected:
            raise ValueError(f"The tokenizer's {name} has the id {found}, the decoder's {expected}.")
    if vq_model.config.code_dim != config.vq_config.code_dim:
        raise ValueError(
            f"Codes of width {vq_model.config.code_dim} do not fit a decoder for codes of {config.vq_config.code_dim}."
        )
    changed = {**config.to_dict(), "code_start_id": code_start_id, "vq_config": vq_model.config.to_dict()}
    changed["text_config"]["vocab_size"] = code_start_id + vq_model.config.codebook_size
    new = NextFlowForConditionalGeneration(type(config)(**changed))
    known = before.get_vocab()
    pieces = {
        index: [known[token]] if token in known else before(after.decode([index]), add_special_tokens=False).input_ids
        for token, index in after.get_vocab().items()
    }
    nearest = model.vq_model.codebook.nearest(vq_model.codebook.table(), model.vq_model.codebook.table())[1][:, 0]
    state = {**model.state_dict(), **{f"model.vq_model.{name}": own for name, own in vq_model.state_dict().items()}}
    for name, fresh in new.state_dict().items():
        if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            continue
        old, rows = state[name], fresh.clone()
        for index, parts in pieces.items():
            if parts:
                rows[index] = old[parts].mean(dim=0)
        rows[code_start_id:] = old[config.code_start_id + nearest]
        state[name] = rows
    # The codebook stays in float32.
    new = new.to(model.dtype)
    new.load_state_dict(state)
    return new
