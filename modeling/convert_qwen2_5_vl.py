"""Qwen2.5-VL's language model as the start of a NextFlow (NextFlow section 3.2.2).

Its vision tower goes, the vocabulary grows by the codes, and connector and scale embedding are new.
"""

from collections.abc import Sequence

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from .configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from .weight_conversion import Dropped, Rule, Shapes, rename

DROPPED = (
    Dropped("visual.", "the image tokenizer takes the vision tower's place"),
    Dropped("model.visual.", "the image tokenizer takes the vision tower's place"),
)
SIGLIP2_DROPPED = (
    Dropped("text_model.", "a text encoder"),
    Dropped("logit_", "a scale of its contrastive loss"),
    Dropped("vision_model.head.", "not used by the tokenizer"),
)
# Published checkpoints name the language model in the first way, transformers' classes in the second.
_PREFIXES = ("model.", "model.language_model.")


def start_config(
    text_config: Qwen2_5_VLTextConfig, vq_config: NextFlowVQConfig, tied: bool, **token_ids: int
) -> NextFlowConfig:
    """The configuration of a NextFlow that starts from a Qwen2.5-VL: its shape, with rows for the codes.

    Args:
        text_config: Qwen's own.
        vq_config: The image tokenizer.
        tied: Whether Qwen's head shares the embedding table.
        token_ids: `boi_token_id`, `eoi_token_id` and `image_token_id`.

    Raises:
        ValueError: If an id is not in Qwen's vocabulary.
    """
    vocab_size = text_config.vocab_size
    outside = {name: own for name, own in token_ids.items() if not 0 <= own < vocab_size}
    if outside:
        raise ValueError(f"Qwen's vocabulary has {vocab_size} rows, which do not hold {outside}.")
    own = text_config.to_dict()
    # Derived from the number of layers.
    own.pop("layer_types", None)
    return NextFlowConfig(
        text_config={**own, "vocab_size": vocab_size + vq_config.codebook_size},
        vq_config=vq_config,
        code_start_id=vocab_size,
        tie_word_embeddings=tied,
        **token_ids,
    )


def language_model_rules(config: NextFlowConfig, shapes: Shapes) -> list[Rule]:
    """How Qwen2.5-VL's language model becomes a NextFlow's; new rows are the mean of the old ones.

    Args:
        config: From [`start_config`].
        shapes: Names and shapes of Qwen's weights.
    """
    codes = config.vq_config.codebook_size
    prefix = next((own for own in reversed(_PREFIXES) if f"{own}embed_tokens.weight" in shapes), _PREFIXES[0])

    def grow(table: torch.Tensor) -> torch.Tensor:
        grown = torch.empty(len(table) + codes, table.shape[1], dtype=table.dtype, device=table.device)
        grown[: len(table)] = table
        # In chunks: the table is the largest weight, and a copy in float32 would be twice as large.
        total = sum(rows.sum(dim=0, dtype=torch.float32) for rows in table.split(8192))
        grown[len(table) :] = (total / len(table)).to(table.dtype)
        return grown

    target = "model.language_model."
    rules = [
        Rule((f"{prefix}embed_tokens.weight",), (f"{target}embed_tokens.weight",), grow),
        rename(f"{prefix}norm.weight", f"{target}norm.weight"),
    ]
    if not config.tie_word_embeddings:
        rules.append(Rule(("lm_head.weight",), ("lm_head.weight",), grow))
    names: Sequence[str] = (
        *(f"self_attn.{own}_proj.{kind}" for own in "qkv" for kind in ("weight", "bias")),
        "self_attn.o_proj.weight",
        *(f"mlp.{own}_proj.weight" for own in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    )
    for layer in range(config.text_config.num_hidden_layers):
        rules += [rename(f"{prefix}layers.{layer}.{name}", f"{target}layers.{layer}.{name}") for name in names]
    return rules


def siglip2_rules(names: Sequence[str]) -> list[Rule]:
    """How a SigLIP2 becomes the semantic encoder of an image tokenizer; `names` are the encoder's own there."""
    return [rename(f"vision_model.{name}", f"model.vq_model.semantic_encoder.{name}") for name in names]
