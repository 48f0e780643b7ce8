"""TokenFlow's text-to-image model (arXiv 2412.03069): a thin sibling of NextFlow, so that its published weights draw.

It shares the image tokenizer and the generation routine. Its own are the decoder layer, which normalises what a
sub-layer gives instead of what it takes, and the inputs: scales accumulate, learned positions and a level embedding
are added, every prompt is padded to one length, and rotary positions count that padding.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3Model, Qwen3RMSNorm
from transformers.utils import can_return_tuple

from .configuration_tokenflow import TokenFlowConfig
from .generation_nextflow import NextFlowImageOutput, NextScaleGenerationMixin
from .modeling_nextflow import NextFlowConnector
from .modeling_nextflow_vq import NextFlowVQModel, OwnsImageTokenizer


class TokenFlowDecoderLayer(GradientCheckpointingLayer):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.self_attn = Qwen3Attention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """`(batch, length, hidden_size)` -> the same; `kwargs` are those of the attention."""
        attended, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))


class TokenFlowTextModel(Qwen3Model):
    """transformers' Qwen3 model with TokenFlow's layers."""

    _no_split_modules = ["TokenFlowDecoderLayer"]
    _can_record_outputs = {"hidden_states": TokenFlowDecoderLayer, "attentions": Qwen3Attention}

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([TokenFlowDecoderLayer(config, own) for own in range(config.num_hidden_layers)])
        self.post_init()


class TokenFlowPreTrainedModel(PreTrainedModel):
    config: TokenFlowConfig
    base_model_prefix = "model"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFlowDecoderLayer", "NextFlowVQModel"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["codebook"]
    # FlashAttention cannot express attention in both directions within a scale.
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, TokenFlowModel):
            for table in (module.level_embedding, module.position_embedding):
                init.normal_(table.weight, std=self.config.text_config.initializer_range)


class TokenFlowModel(TokenFlowPreTrainedModel):
    """The decoder with its tokenizer, without the head."""

    def __init__(self, config: TokenFlowConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.language_model = TokenFlowTextModel._from_config(config.text_config)
        for layer in self.language_model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.variance_epsilon = config.qk_norm_eps
        self.connector = NextFlowConnector(config)
        # Row 0 is text's, row k + 1 the slots' of scale k (from 0); row 1 is never used.
        self.level_embedding = nn.Embedding(config.schedule.num_scales + 1, width)
        self.position_embedding = nn.Embedding(config.num_codes, width)
        self.vq_model = NextFlowVQModel._from_config(config.vq_config).requires_grad_(False)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def embed_text(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Text tokens `(batch, length)` -> `(batch, length, hidden_size)`."""
        return self.language_model.embed_tokens(input_ids) + self.level_embedding.weight[0]

    def embed_block(self, features: torch.Tensor, scale: int, num_scales: torch.Tensor) -> torch.Tensor:
        """Embeddings of the slots of one scale after the first (from 0).

        Args:
            features: `(batch, slots, code_dim)` from `scale_inputs`.
            scale: Index of the scale.
            num_scales: Not used: all pictures have the same scales.
        """
        first = sum(side * side for side in self.config.schedule.sides[:scale])
        positions = self.position_embedding.weight[first : first + features.shape[1]]
        return self.connector(features) + self.level_embedding.weight[scale + 1] + positions

    def embed_sequences(self, input_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.LongTensor]:
        """Embeddings of prompts, and of whole training sequences, whose codes stand among the ids.

        The slot that predicts code j stands one position before it, so the first is the end of the prompt, and the
        place of the last code is empty.

        Args:
            input_ids: `(batch, length)`. A row may hold one whole picture, or end where one begins.

        Returns:
            Embeddings `(batch, length, hidden_size)` and blocks `(batch, length)`, -1 where attention is causal.

        Raises:
            ValueError: If a row holds codes that are not one whole picture behind a prompt.
        """
        config = self.config
        is_code = (input_ids >= config.code_start_id) & (
            input_ids < config.code_start_id + config.vq_config.codebook_size
        )
        embeds = self.embed_text(input_ids.masked_fill(is_code, 0))
        blocks = torch.full_like(input_ids, -1)
        opens = input_ids[:, -len(config.image_start_ids) :].tolist()
        for row in range(len(input_ids)):
            if not bool(is_code[row].any()):
                if opens[row] == list(config.image_start_ids):
                    embeds[row, -1] += self.position_embedding.weight[0]
                continue
            start, number = int(is_code[row].int().argmax()), int(is_code[row].sum())
            if start == 0 or number != config.num_codes or not bool(is_code[row, start : start + number].all()):
                raise ValueError(
                    f"Row {row} holds {number} codes; a picture is {config.num_codes} behind a prompt, without a gap."
                )
            codes = input_ids[row : row + 1, start : start + number] - config.code_start_id
            slots, own_blocks = self._embed_picture(codes)
            embeds[row, start - 1] += self.position_embedding.weight[0]
            embeds[row, start : start + number] = slots
            blocks[row, start : start + number] = own_blocks
        return embeds, blocks

    def _embed_picture(self, codes: torch.LongTensor) -> tuple[torch.Tensor, torch.LongTensor]:
        """Embeddings and blocks at the places of one picture's codes `(1, num_codes)`, the empty last one included."""
        grids = self.config.schedule.grids((self.config.schedule.sides[-1],) * 2)
        scales = self.vq_model.split_codes(codes, grids)
        embeds, blocks = [], []
        for scale in range(1, len(grids)):
            features = self.vq_model.scale_inputs(scales[:scale], grids, self.config.visual_input)
            embeds.append(self.embed_block(features, scale, None)[0])
            blocks.append(torch.full((features.shape[1],), scale))
        embeds.append(self.level_embedding.weight[:1])
        blocks.append(torch.tensor([-1]))
        return torch.cat(embeds), torch.cat(blocks).to(codes.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        block_sequence_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `(batch, length)` as [`embed_sequences`] takes them.
            attention_mask: `(batch, past + length)`, 0 at padding.
            position_ids: `(batch, length)`; by default columns are counted, padding included.
            past_key_values: The key-value cache.
            inputs_embeds: `(batch, length, hidden_size)` instead of `input_ids`.
            block_sequence_ids: `(batch, past + length)` block of each position, -1 for causal ones; made from
                `input_ids` by default.
            use_cache: Whether to return a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give `input_ids` or `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds, blocks = self.embed_sequences(input_ids)
            block_sequence_ids = blocks if block_sequence_ids is None else block_sequence_ids
        past_length = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        batch, length = inputs_embeds.shape[:2]
        if position_ids is None:
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past_length).expand(batch, -1)
        if attention_mask is None:
            attention_mask = torch.ones(batch, past_length + length, dtype=torch.long, device=inputs_embeds.device)
        mask = create_causal_mask(
            config=self.config.text_config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            block_sequence_ids=block_sequence_ids,
        )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask={"full_attention": mask},
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


class TokenFlowForImageGeneration(OwnsImageTokenizer, TokenFlowPreTrainedModel, NextScaleGenerationMixin):
    """TokenFlow's text-to-image model: `generate` draws a picture of 256 pixels for every prompt.

    `generate` takes what [`NextFlowForConditionalGeneration`]'s takes in image mode. Without `negative_prompt_ids`
    guidance leads away from an empty prompt.
    """

    output_modalities = ("image",)
    accepts_loss_kwargs = False

    def __init__(self, config: TokenFlowConfig):
        super().__init__(config)
        self.model = TokenFlowModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Arguments not listed are those of [`TokenFlowModel`].

        Args:
            input_ids: `(batch, length)` prompts, with the pictures' codes behind them in training.
            labels: `(batch, length)` ids to predict, shifted inside as usual; -100 where there is none.
            logits_to_keep: As in transformers.

        Returns:
            Logits `(batch, kept, vocab_size)` in float32, and with labels their mean cross-entropy.
        """
        outputs = self.model(input_ids=input_ids, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(
        self, inputs: torch.Tensor | None = None, generation_mode: str | None = "image", **kwargs
    ) -> NextFlowImageOutput:
        """Draw a picture for every prompt; see the class."""
        if generation_mode != "image":
            raise ValueError(
                f'This model draws pictures alone; `generation_mode` must be "image", got {generation_mode!r}.'
            )
        if kwargs.get("mask") is not None:
            raise ValueError("This model takes no pictures, so there is nothing to edit within a `mask`.")
        return super().generate(inputs, generation_mode=generation_mode, **kwargs)

    # ---- what the generation routine asks ----------------------------------------------------------------------------

    def _open(self, prompts, image_codes, context_grids, grids):
        input_ids = torch.cat([ids for ids, _ in prompts])
        attention_mask = torch.cat([mask for _, mask in prompts])
        embeds, blocks = self.model.embed_sequences(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
        return embeds, positions, attention_mask, blocks

    def _slot_positions(self, grids, scale, start_time, width):
        first = sum(height * width for height, width in grids[0][:scale])
        return start_time[:, None] + first + torch.arange(width, device=start_time.device)

    def _end_prompts(self, input_ids, attention_mask):
        """End each row with `<img>`, and pad it on the left to the one length of prompts."""
        opening = input_ids.new_tensor(self.config.image_start_ids)
        is_open = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if input_ids.shape[1] >= len(opening):
            is_open = (input_ids[:, -len(opening) :] == opening).all(dim=1)
        if bool(is_open.any()) and not bool(is_open.all()):
            raise ValueError("Either all prompts of a batch end with <img>, or none.")
        if not bool(is_open.all()):
            input_ids = torch.cat([input_ids, opening.expand(len(input_ids), -1)], dim=1)
            attention_mask = F.pad(attention_mask, (0, len(opening)), value=1)
        # Padding may be longer than one prompt of a batch needs.
        longest = int(attention_mask.sum(dim=1).max())
        room = self.config.prompt_length + len(opening)
        if longest > room:
            raise ValueError(
                f"A prompt may have {self.config.prompt_length} tokens, got {longest - len(opening)}; shorten it."
            )
        if input_ids.shape[1] > room:
            input_ids, attention_mask = input_ids[:, -room:], attention_mask[:, -room:]
        padding = (room - input_ids.shape[1], 0)
        return F.pad(input_ids, padding, value=self.config.text_config.pad_token_id or 0), F.pad(
            attention_mask, padding
        )

    def _unconditional(self, input_ids, attention_mask, negative_ids, negative_mask):
        if negative_ids is None:
            negative_ids, negative_mask = input_ids.new_tensor([[self.config.text_config.bos_token_id]]), None
        negative_ids, negative_mask = self._check_prompts(negative_ids, negative_mask)
        negative_ids, negative_mask = self._end_prompts(negative_ids, negative_mask)
        if len(negative_ids) not in (1, len(input_ids)):
            raise ValueError(f"{len(negative_ids)} negative prompts were given for {len(input_ids)} prompts.")
        return negative_ids.expand(len(input_ids), -1), negative_mask.expand(len(input_ids), -1)


__all__ = ["TokenFlowConfig", "TokenFlowForImageGeneration", "TokenFlowModel"]
