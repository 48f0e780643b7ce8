"""NextFlow: one decoder-only transformer over text tokens and next-scale image codes (arXiv 2601.02204).

What differs from Qwen2.5-VL's text decoder, whose layers, norms, rotary sections and caches are used as they are:

* an image is drawn scale by scale; the slots of a scale attend to each other in both directions (`block_sequence_ids`);
* a slot is fed the previous scale's codes, looked up in the tokenizer's codebook, through a connector, plus a learned
  scale embedding and a sinusoidal encoding of the number of scales;
* rotary positions of slots are normalised to a range that all resolutions share (`image_layout.py`);
* one head over the merged vocabulary of text tokens and codes; logits of whole images are never materialised.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.utils import ModelOutput, can_return_tuple, logging

from .block_attention import BLOCK_VARLEN, BatchRuns, find_runs
from .chunked_cross_entropy import chunked_cross_entropy, chunked_log_probs
from .configuration_nextflow import NextFlowConfig
from .generation_nextflow import NextScaleGenerationMixin
from .image_layout import (
    ImageSpan,
    SequenceLayout,
    cached_time_offsets,
    layout_sequences,
    positions_in_documents,
    read_grids,
)
from .modeling_nextflow_vq import NextFlowVQModel, OwnsImageTokenizer
from .scale_schedule import Grid

logger = logging.get_logger(__name__)


@dataclass
class NextFlowModelOutput(ModelOutput):
    """Output of [`NextFlowModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): Output of the last layer.
        past_key_values (`Cache`, *optional*): The key-value cache.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): Input of every layer and the output of the last.
        attentions (`tuple[torch.FloatTensor]`, *optional*): Attention weights of every layer.
        image_codes (`torch.LongTensor` of shape `(images, num_codes)`, *optional*):
            Codes of the images, padded with -1; those that were given, or encoded from the pixels.
        layout (`SequenceLayout`, *optional*): Where the images lie in the sequences.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_codes: torch.LongTensor | None = None
    layout: SequenceLayout | None = None


@dataclass
class NextFlowOutput(ModelOutput):
    """Output of [`NextFlowForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor`, *optional*): `text_loss` + `image_loss`.
        logits (`torch.FloatTensor` of shape `(batch, kept, vocab_size)`, *optional*):
            Scores over text tokens and codes; not computed where a loss is asked for, in evaluation neither: `Trainer`
            calls `compute_metrics` without predictions.
        past_key_values (`Cache`, *optional*): The key-value cache.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): Input of every layer and the output of the last.
        attentions (`tuple[torch.FloatTensor]`, *optional*): Attention weights of every layer.
        text_loss (`torch.FloatTensor`, *optional*): Mean cross-entropy over the labelled text tokens.
        image_loss (`torch.FloatTensor`, *optional*): Scale-weighted mean cross-entropy over the labelled codes.
        image_loss_per_scale (`torch.FloatTensor` of shape `(num_scales,)`, *optional*):
            Unweighted mean of each scale, NaN for scales without labels.
        code_log_probs (`torch.FloatTensor` of shape `(scored,)`, *optional*):
            Log-probability among the codes of each of `scored_codes`, in order of image and code.
        code_entropies (`torch.FloatTensor` of shape `(scored,)`, *optional*): Entropy of each one's distribution.
        token_log_probs (`torch.FloatTensor` of shape `(scored,)`, *optional*):
            Log-probability among the text tokens of each of `scored_tokens`, in order of row and column.
        token_entropies (`torch.FloatTensor` of shape `(scored,)`, *optional*): Entropy of each one's distribution.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    text_loss: torch.FloatTensor | None = None
    image_loss: torch.FloatTensor | None = None
    image_loss_per_scale: torch.FloatTensor | None = None
    code_log_probs: torch.FloatTensor | None = None
    code_entropies: torch.FloatTensor | None = None
    token_log_probs: torch.FloatTensor | None = None
    token_entropies: torch.FloatTensor | None = None


class NextFlowConnector(nn.Module):
    """Two-layer MLP from code vectors to the decoder's width (NextFlow sections 2.2 and 3.2)."""

    def __init__(self, config: NextFlowConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vq_config.code_dim, width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., code_dim)` -> `(..., hidden_size)`."""
        return self.linear_2(self.act(self.linear_1(features.to(self.linear_1.weight.dtype))))


class NextFlowScaleEmbedding(nn.Module):
    """What tells a slot its scale: a learned embedding, and a sinusoidal encoding of the picture's number of scales.

    The encoding says what resolution is being drawn, from the first code on. The paper gives neither its form nor its
    place; this one is the transformer's usual sinusoid, added at `<boi>` and at every slot of the image.
    """

    def __init__(self, config: NextFlowConfig):
        super().__init__()
        # One row per scale, and one for the block of final features behind a context image.
        self.scale = nn.Embedding(config.schedule.num_scales + 1, config.text_config.hidden_size)

    def forward(self, scales: torch.LongTensor, num_scales: torch.Tensor) -> torch.Tensor:
        """Scale index (from 0) and number of scales of each slot, both `(slots,)` -> `(slots, hidden_size)`."""
        embeddings = self.scale(scales)
        half = embeddings.shape[-1] // 2
        frequencies = torch.exp(torch.arange(half, device=scales.device) * (-math.log(1e4) / half))
        angles = num_scales.float()[:, None] * frequencies
        # The scale of the token embeddings, so that it neither drowns nor is drowned.
        length = torch.cat([angles.sin(), angles.cos()], dim=-1) * 0.02
        return embeddings + length.to(embeddings.dtype)


class NextFlowPreTrainedModel(PreTrainedModel):
    config: NextFlowConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "NextFlowVQModel"]
    _skip_keys_device_placement = ["past_key_values", "layout"]
    _keep_in_fp32_modules_strict = ["codebook"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, NextFlowScaleEmbedding):
            init.normal_(module.scale.weight, std=self.config.text_config.initializer_range)


class NextFlowTextModel(Qwen2_5_VLTextModel):
    """transformers' Qwen2.5-VL text model. Its attention goes through the interface, so FlexAttention works too."""

    _supports_flex_attn = True


class NextFlowModel(NextFlowPreTrainedModel):
    """The decoder with its tokenizer, without the head."""

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        self.language_model = NextFlowTextModel._from_config(config.text_config)
        self.connector = NextFlowConnector(config)
        self.scale_embedding = NextFlowScaleEmbedding(config)
        self.vq_model = NextFlowVQModel._from_config(config.vq_config).requires_grad_(False)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None = None) -> tuple:
        """Pixels -> codes.

        Args:
            pixel_values: `(images, 3, height, width)` in [-1, 1]; smaller pictures are padded at the bottom and right.
            image_grids: `(images, scales, 2)` padded with zeros; by default every picture has the full size.

        Returns:
            Codes `(images, num_codes)` padded with -1, and the grids of each image.
        """
        if image_grids is None:
            grids = [self.config.schedule.grids_for_size(*pixel_values.shape[-2:])] * len(pixel_values)
        else:
            grids = read_grids(image_grids)
        if len(grids) != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} pictures were given, but grids of {len(grids)}.")
        codes = [None] * len(grids)
        for key in dict.fromkeys(grids):
            height, width = self.config.schedule.image_size(key[-1])
            if height > pixel_values.shape[-2] or width > pixel_values.shape[-1]:
                raise ValueError(
                    f"An image's grids end in {key[-1]}, {height}x{width} pixels, but the pixels given are "
                    f"{pixel_values.shape[-2]}x{pixel_values.shape[-1]}."
                )
            members = [index for index, own in enumerate(grids) if own == key]
            pixels = pixel_values[members][..., :height, :width]
            # The same codes whoever asks: a trainer's autocast would choose others here and there.
            with torch.autocast(pixels.device.type, enabled=False):
                encoding = self.vq_model.encode(pixels.to(self.vq_model.device), key)
            for index, own in zip(members, encoding.codes.to(pixels.device)):
                codes[index] = own
        return nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1), grids

    def embed_images(
        self,
        inputs_embeds: torch.Tensor,
        spans: tuple[ImageSpan, ...],
        image_codes: torch.LongTensor,
    ) -> torch.Tensor:
        """Fill the slots of `inputs_embeds` `(batch, length, hidden_size)` with the images' codes.

        Args:
            inputs_embeds: Embeddings of the text; returned anew, not changed in place.
            spans: Where the images lie.
            image_codes: `(images, num_codes)` padded with -1; what the slots are fed.
        """
        device = inputs_embeds.device
        rows, columns, scales, lengths, features = [], [], [], [], []
        groups = _group(spans, lambda span: (span.grids, span.num_blocks, span.final_only))
        for (grids, num_blocks, final_only), members in groups.items():
            first = len(grids) if final_only else 1
            blocks = enumerate(spans[members[0]].blocks, first)
            scale_of_slot = torch.tensor([0, *(k for k, (h, w) in blocks for _ in range(h * w))])
            starts = torch.tensor([(spans[index].row, spans[index].start) for index in members])
            rows.append(starts[:, 0].repeat_interleave(len(scale_of_slot)))
            columns.append((starts[:, 1:] + torch.arange(len(scale_of_slot))).flatten())
            scales.append(scale_of_slot.repeat(len(members)))
            lengths.append(torch.full_like(scales[-1], len(grids)))
            if num_blocks:
                own = self._slot_features(image_codes[members].to(self.vq_model.device), grids, num_blocks, final_only)
                features.append(own.flatten(0, 1))
        rows, columns = torch.cat(rows).to(device), torch.cat(columns).to(device)
        scales, lengths = torch.cat(scales).to(device), torch.cat(lengths).to(device)
        is_boi = scales == 0
        # Under a `device_map` the parts may lie on other devices than the text.
        vision_embeds = self.scale_embedding(scales, lengths).to(device)
        # <boi> is a text token that learns its image's length; a slot is its code features.
        vision_embeds = vision_embeds + torch.where(is_boi[:, None], inputs_embeds[rows, columns], 0)
        if features:
            slots = (~is_boi).nonzero()[:, 0]
            vision_embeds = vision_embeds.index_add(0, slots, self.connector(torch.cat(features)).to(vision_embeds))
        return inputs_embeds.index_put((rows, columns), vision_embeds.to(inputs_embeds.dtype))

    def embed_block(self, features: torch.Tensor, scale: int, num_scales: torch.Tensor) -> torch.Tensor:
        """Embeddings of one block of slots while drawing: [`embed_images`] for a single scale.

        Args:
            features: `(batch, slots, code_dim)` from `scale_inputs`.
            scale: Index of the scale, from 0.
            num_scales: `(batch,)` number of scales of each picture.
        """
        embeddings = self.scale_embedding(torch.full_like(num_scales, scale), num_scales)
        return self.connector(features).to(num_scales.device) + embeddings[:, None].to(num_scales.device)

    def _no_image(self, device: torch.device) -> torch.Tensor:
        """A zero with gradients of zero: other processes, whose rows have pictures, wait for a gradient of these."""
        features = torch.zeros(1, 1, self.config.vq_config.code_dim, device=device)
        return 0.0 * self.embed_block(features, 0, torch.ones(1, dtype=torch.long, device=device)).sum()

    def _slot_features(
        self, codes: torch.LongTensor, grids: tuple[Grid, ...], num_blocks: int, final_only: bool
    ) -> torch.Tensor:
        """Code features at all slots of images of one shape: `(images, slots, code_dim)`."""
        needed = sum(h * w for h, w in (grids if final_only else grids[:num_blocks]))
        if codes.shape[1] < needed:
            raise ValueError(f"The slots of {num_blocks} blocks need {needed} codes an image, got {codes.shape[1]}.")
        self.vq_model._check_codes(codes[:, :needed])
        blocks = []
        if not final_only:
            scales = self.vq_model.split_codes(codes[:, :needed], grids)
            blocks += [
                self.vq_model.scale_inputs(scales[:k], grids, self.config.visual_input)
                for k in range(1, min(num_blocks, len(grids) - 1) + 1)
            ]
        if final_only or num_blocks == len(grids):
            blocks.append(self.vq_model.sum_features(codes[:, :needed], grids).flatten(2).transpose(1, 2))
        return torch.cat(blocks, dim=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        block_sequence_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> NextFlowModelOutput:
        """
        Args:
            input_ids: `(batch, length)` text tokens, and `<boi>`, placeholders and `<eoi>` for each image.
            pixel_values: `(images, 3, height, width)` pictures in [-1, 1], encoded on the fly.
            image_codes: `(images, num_codes)` codes that the slots are fed, padded with -1; instead of pixels.
            image_grids: `(images, scales, 2)` (height, width) of every scale, padded with zeros. Required with
                `image_codes`.
            attention_mask: `(batch, past + length)`, 0 at padding.
            position_ids: `(3, batch, length)` time, row and column; made from the inputs by default. Text alone may
                be given as `(batch, length)`.
            past_key_values: The key-value cache. It also tells how much time its pictures took: what comes behind it,
                text or pictures, goes on from there.
            inputs_embeds: `(batch, length, hidden_size)` instead of `input_ids`; images are found by the embeddings of
                their tokens, unless `input_ids` stand beside it.
            block_sequence_ids: `(batch, past + length)` block of each position, -1 for causal ones; made from the
                inputs by default.
            document_ids: `(batch, length)` for packed rows: the document of each position, -1 at padding. A document
                sees itself alone, its positions start at 0, and its last token predicts nothing. Stands in place of
                `attention_mask`, without a cache.
            use_cache: Whether to return a cache.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("Give `input_ids` or `inputs_embeds`.")
        image_labels = kwargs.pop("image_labels", None)
        if image_labels is not None and bool((image_labels != -100).any()):
            raise ValueError(
                "`image_labels` came to the decoder without its head, which would learn nothing of the pictures: TRL's "
                "trainers go past the model's own loss. Use `nextflow_hf.training.sft.NextFlowSFTTrainer` or `Trainer`."
            )
        if document_ids is not None:
            _check_documents(document_ids, inputs_embeds if input_ids is None else input_ids, past_key_values)
            attention_mask = (document_ids >= 0).long()
        layout = None
        past_length = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        offsets = cached_time_offsets(past_key_values, len(input_ids if inputs_embeds is None else inputs_embeds))
        has_images = image_codes is not None or pixel_values is not None
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)
        if has_images:
            if input_ids is None:
                input_ids = self._find_image_tokens(inputs_embeds)
            if pixel_values is not None and image_codes is None:
                image_codes, grids = self.encode_images(pixel_values, image_grids)
            elif image_grids is None:
                raise ValueError("`image_codes` need `image_grids`, which tell the scales of each image.")
            else:
                grids = read_grids(image_grids)
                for own in dict.fromkeys(grids):
                    self._check_grids(own, grids.index(own))
            if len(image_codes) != len(grids):
                raise ValueError(f"Codes of {len(image_codes)} images were given, but grids of {len(grids)}.")
            layout = layout_sequences(input_ids, attention_mask, grids, self.config, document_ids, past_length, offsets)
            inputs_embeds = self.embed_images(inputs_embeds, layout.spans, image_codes)
            position_ids = layout.position_ids if position_ids is None else position_ids
            if block_sequence_ids is None:
                block_sequence_ids = F.pad(layout.block_ids, (past_length, 0), value=-1)
        elif input_ids is not None and past_length == 0 and (input_ids == self.config.image_token_id).any():
            raise ValueError("The text holds image placeholders, but neither `pixel_values` nor `image_codes` came.")
        elif self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            inputs_embeds = inputs_embeds + self._no_image(inputs_embeds.device).to(inputs_embeds.dtype)

        if position_ids is None:
            position_ids = _text_positions(inputs_embeds, attention_mask, past_length, document_ids)
            if offsets is not None:
                position_ids = position_ids - offsets[:, None]
        mask = self._attention_mask(
            inputs_embeds, attention_mask, past_key_values, block_sequence_ids, document_ids, kwargs
        )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if layout is not None and outputs.past_key_values is not None:
            # Kept with what they belong to, as a cache may serve a later call.
            outputs.past_key_values.time_offsets = layout.time_offsets + (0 if offsets is None else offsets)
        return NextFlowModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_codes=image_codes,
            layout=layout,
        )

    def _find_image_tokens(self, inputs_embeds: torch.Tensor) -> torch.LongTensor:
        """Ids of the image tokens in `inputs_embeds`; -1 where another token stands."""
        ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for token in (self.config.boi_token_id, self.config.image_token_id, self.config.eoi_token_id):
            embedding = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
            ids[(inputs_embeds == embedding).all(dim=-1)] = token
        return ids

    def _check_grids(self, grids: tuple[Grid, ...], index: int) -> None:
        try:
            self.config.schedule.check_grids(grids)
        except ValueError as error:
            raise ValueError(f"`image_grids` of image {index}: {error}") from error

    def _attention_mask(
        self, inputs_embeds, attention_mask, past_key_values, block_sequence_ids, document_ids, kwargs
    ) -> dict:
        """The finished mask for each kind of layer: within a document causal, and two-sided within a block."""
        if isinstance(attention_mask, dict):
            return attention_mask
        if block_sequence_ids is not None and not bool((block_sequence_ids >= 0).any()):
            block_sequence_ids = None
        past_length = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if attention_mask is None:
            # Without a mask, positions that do not grow by one would be taken for packed sequences.
            attention_mask = inputs_embeds.new_ones(
                (inputs_embeds.shape[0], past_length + inputs_embeds.shape[1]), dtype=torch.long
            )
        implementation = self.config.text_config._attn_implementation or ""
        if implementation == BLOCK_VARLEN and past_length == 0 and _is_contiguous(attention_mask):
            documents = attention_mask.long() - 1 if document_ids is None else document_ids
            blocks = torch.full_like(documents, -1) if block_sequence_ids is None else block_sequence_ids
            kwargs["runs"] = BatchRuns(find_runs(blocks, documents), documents.shape[1])
            return {"full_attention": None}
        if document_ids is not None and "flash" in implementation:
            raise ValueError(
                f'"{implementation}" cannot keep packed documents apart here. Load the model with '
                f'attn_implementation="{BLOCK_VARLEN}", "sdpa" or "flex_attention".'
            )
        if block_sequence_ids is not None and "flash" in implementation:
            queries = block_sequence_ids[:, -inputs_embeds.shape[1] :]
            one_whole_block = bool((queries >= 0).all() and (queries == queries[:, :1]).all())
            if not (one_whole_block and past_key_values is not None and bool(attention_mask.all())):
                raise ValueError(
                    f'"{implementation}" cannot express attention in both directions within a scale and would silently '
                    "turn causal. It is exact for text, and for cached drawing without padding; elsewhere load the "
                    'model with attn_implementation="sdpa" or "flex_attention".'
                )
            kwargs["is_causal"] = False
            return {"full_attention": None}
        is_whole = past_key_values is None and attention_mask.ndim == 2
        if document_ids is None and is_whole and not bool(attention_mask.all()):
            # Padding is a document of its own: a position that sees nothing is NaN in some kernels.
            document_ids = attention_mask.long() - 1
        mask = create_causal_mask(
            config=self.config.text_config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask if document_ids is None else torch.ones_like(attention_mask),
            past_key_values=past_key_values,
            block_sequence_ids=block_sequence_ids,
            and_mask_function=None if document_ids is None else packed_sequence_mask_function(document_ids),
        )
        return {"full_attention": mask}


class NextFlowForConditionalGeneration(OwnsImageTokenizer, NextFlowPreTrainedModel, NextScaleGenerationMixin):
    """NextFlow with its one head over text tokens and image codes."""

    output_modalities = ("image", "text")
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # Losses are means over this call's own tokens.
    accepts_loss_kwargs = False

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        self.model = NextFlowModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """As in transformers; refuses sizes without room for the image codes, which are the last rows.

        New tokens need no more rows: those between the tokenizer's length and `config.code_start_id` are free.
        """
        rows = self.config.code_start_id + self.config.vq_config.codebook_size
        if new_num_tokens is not None and new_num_tokens < rows:
            raise ValueError(
                f"{new_num_tokens} rows would cut off image codes, which end with row {rows}. Tokens up to "
                f"{self.config.code_start_id} need no resizing; `nextflow_hf.training.vocabulary` makes room for more."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        scored_codes: torch.LongTensor | None = None,
        scored_tokens: torch.LongTensor | None = None,
        score_temperature: float = 1.0,
        score_drawing: bool = True,
        **kwargs,
    ) -> NextFlowOutput:
        """
        Arguments not listed are those of [`NextFlowModel`].

        Args:
            labels: `(batch, length)` text labels, shifted inside as usual; -100 where there is none. Labels at
                `<eoi>` and at placeholders are ignored: slots predict codes, so pictures are learned by `image_labels`
                alone.
            image_labels: `(images, num_codes)` codes that the slots are to predict, aligned (not shifted); -100 where
                there is none. With self-correction they differ from `image_codes`, which the slots are fed.
            shift_labels: `(batch, length)` text labels that are shifted already, instead of `labels`.
            logits_to_keep: As in transformers. Ignored where labels or anything to score is given: logits are then not
                returned.
            scored_codes: `(images, num_codes)` codes whose log-probabilities are returned, aligned with the slots as
                `image_labels` are; -100 where none is. For reinforcement learning (NextFlow Eq 3): their sum over a
                scale is the log-probability of that scale's action.
            scored_tokens: `(batch, length)` text tokens whose log-probabilities are returned, each at the position
                before its own; -100 where none is. Their chances are those among what text may hold in `generate`.
            score_temperature: Divides the scores of `scored_codes` and `scored_tokens`.
            score_drawing: Whether text may begin a picture, as in interleaved generation and not in text alone.
        """
        # Not named in the signature: `Trainer` gives no `eval_loss` for batches that lack any labels named there.
        image_labels, shift_labels = kwargs.pop("image_labels", None), kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_codes=image_codes,
            image_grids=image_grids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = text_loss = image_loss = image_loss_per_scale = None
        if all(own is None for own in (labels, shift_labels, image_labels, scored_codes, scored_tokens)):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
            if document_ids is not None:
                same_document = F.pad(document_ids, (0, 1), value=-1)[:, 1:] == document_ids
                shift_labels = shift_labels.masked_fill(~same_document, -100)
        if shift_labels is not None or image_labels is not None:
            text_loss, image_loss, image_loss_per_scale = self._losses(
                hidden_states, shift_labels, image_labels, outputs.layout
            )
        code_log_probs = code_entropies = token_log_probs = token_entropies = None
        if scored_codes is not None:
            if outputs.layout is None:
                raise ValueError("`scored_codes` need `image_codes` or `pixel_values` to say where their slots are.")
            slots, codes, _, _ = self._labelled_slots(scored_codes, outputs.layout.spans, hidden_states.device)
            code_log_probs, code_entropies = chunked_log_probs(
                self._code_scores, hidden_states[slots], codes, score_temperature, self.config.vq_config.codebook_size
            )
        if scored_tokens is not None:
            scored = scored_tokens != -100
            token_log_probs, token_entropies = chunked_log_probs(
                partial(self._text_scores, images=score_drawing),
                hidden_states[scored],
                scored_tokens[scored],
                score_temperature,
                self.config.code_start_id,
            )
        losses = [loss for loss in (text_loss, image_loss) if loss is not None]
        return NextFlowOutput(
            loss=sum(losses) if losses else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            text_loss=text_loss,
            image_loss=image_loss,
            image_loss_per_scale=image_loss_per_scale,
            code_log_probs=code_log_probs,
            code_entropies=code_entropies,
            token_log_probs=token_log_probs,
            token_entropies=token_entropies,
        )

    def _losses(
        self,
        hidden_states: torch.Tensor,
        shift_labels: torch.LongTensor | None,
        image_labels: torch.LongTensor | None,
        layout: SequenceLayout | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Text loss, image loss and the image loss of each scale; both modalities pass the head together."""
        rows, labels, weights = [], [], []
        if shift_labels is not None:
            # Slots predict codes, and `<eoi>` is forced.
            is_slot = shift_labels == self.config.image_token_id
            if image_labels is None and bool(is_slot.any()):
                logger.warning_once(
                    "`labels` at pictures' placeholders are ignored, and no `image_labels` say what the pictures are: "
                    "text is learned, pictures are not. `nextflow_hf.training.conversation_collator` labels both."
                )
            ignored = is_slot | (shift_labels == self.config.eoi_token_id)
            labelled = (shift_labels != -100) & ~ignored
            rows.append(hidden_states[labelled])
            labels.append(shift_labels[labelled])
            weights.append(torch.ones_like(labels[-1], dtype=torch.float32) / max(1, len(labels[-1])))
        if image_labels is not None:
            if layout is None:
                raise ValueError("`image_labels` need `image_codes` or `pixel_values` to say where their slots are.")
            slots, codes, code_weights, scales = self._labelled_slots(image_labels, layout.spans, hidden_states.device)
            rows.append(hidden_states[slots])
            labels.append(codes + self.config.code_start_id)
            weights.append(code_weights / max(1, len(codes)))
        sizes = [len(own) for own in labels]
        means, losses = chunked_cross_entropy(
            self.lm_head, torch.cat(rows), torch.cat(labels), torch.cat(weights), sizes
        )
        text_loss = image_loss = per_scale = None
        if shift_labels is not None:
            text_loss = means[0]
        if image_labels is not None:
            image_loss, own = means[-1], losses.split(sizes)[-1]
            num_scales = self.config.schedule.num_scales
            per_scale = own.new_zeros(num_scales).index_add(0, scales, own)
            per_scale = per_scale / torch.bincount(scales, minlength=num_scales)
        return text_loss, image_loss, per_scale

    def _labelled_slots(self, image_labels: torch.LongTensor, spans: tuple[ImageSpan, ...], device) -> tuple:
        """Row and column of the slots that have a label, and each one's code, loss weight and scale.

        NextFlow Eq 2: token weights 1 / (h w)^alpha, renormalised so that the total stays what it was.
        """
        if len(image_labels) != len(spans):
            raise ValueError(f"Labels of {len(image_labels)} images were given for {len(spans)} images.")
        num_codes = max(span.num_codes for span in spans)
        if image_labels.shape[1] < num_codes:
            raise ValueError(
                f"The slots predict {num_codes} codes an image, but there are {image_labels.shape[1]} labels."
            )
        images, within, weights, scales = [], [], [], []
        groups = _group(spans, lambda span: span.grids[: span.num_predicted_scales])
        for grids, members in groups.items():
            own_weights, own_scales = self._scale_weights(grids)
            images.append(torch.tensor(members).repeat_interleave(len(own_scales)))
            within.append(torch.arange(len(own_scales)).repeat(len(members)))
            weights.append(own_weights.repeat(len(members)))
            scales.append(own_scales.repeat(len(members)))
        # In the order of the images, whatever their shapes.
        order = torch.cat(images).argsort(stable=True)
        images, within, weights, scales = (torch.cat(own)[order] for own in (images, within, weights, scales))
        starts = torch.tensor([(span.row, span.start) for span in spans])[images]
        labels = image_labels[images.to(image_labels.device), within.to(image_labels.device)]
        rows, columns = starts[:, 0].to(device), (starts[:, 1] + within).to(device)
        weights, scales = weights.to(device), scales.to(device)
        labelled = labels != -100
        rows, columns, weights, scales = (own[labelled.to(device)] for own in (rows, columns, weights, scales))
        labels = labels[labelled]
        if labels.numel() and (labels.min() < 0 or labels.max() >= self.config.vq_config.codebook_size):
            raise ValueError(
                f"Image labels must be codes 0..{self.config.vq_config.codebook_size - 1} or -100, got "
                f"{labels.min().item()}..{labels.max().item()}."
            )
        return (rows, columns), labels, weights, scales

    def _scale_weights(self, grids: tuple[Grid, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and scale index of each code of an image with these grids; the weights have mean 1."""
        areas = torch.tensor([height * width for height, width in grids], dtype=torch.long)
        weights = areas.float() ** -self.config.scale_loss_alpha
        weights = weights * (areas.sum() / (areas * weights).sum())
        return weights.repeat_interleave(areas), torch.arange(len(grids)).repeat_interleave(areas)


def _group(items, key) -> dict:
    """Indices of `items` by `key(item)`, in order of first appearance."""
    groups: dict = {}
    for index, item in enumerate(items):
        groups.setdefault(key(item), []).append(index)
    return groups


def _is_contiguous(attention_mask: torch.Tensor) -> bool:
    """Whether every row of a `(batch, length)` mask is one stretch, with padding before and behind it alone."""
    if attention_mask.ndim != 2:
        return False
    valid = F.pad(attention_mask.bool().int(), (1, 0))
    return bool((valid.diff(dim=1) > 0).sum(dim=1).le(1).all())


def _check_documents(document_ids: torch.Tensor, inputs: torch.Tensor, past_key_values: Cache | None) -> None:
    if document_ids.shape != inputs.shape[:2]:
        raise ValueError(
            f"`document_ids` must have the shape of the inputs, {tuple(inputs.shape[:2])}, got "
            f"{tuple(document_ids.shape)}."
        )
    if past_key_values is not None and int(past_key_values.get_seq_length()) > 0:
        raise ValueError("Packed documents cannot follow a cache: `document_ids` describe whole rows.")


def _text_positions(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_length,
    document_ids: torch.LongTensor | None = None,
) -> torch.Tensor:
    """Positions `(batch, length)` of text that follows `past_length` positions of text; padding does not count."""
    length = inputs_embeds.shape[1]
    if document_ids is not None:
        return positions_in_documents(document_ids)
    if attention_mask is None or isinstance(attention_mask, dict) or attention_mask.ndim != 2:
        return (torch.arange(length, device=inputs_embeds.device) + past_length).expand(len(inputs_embeds), -1)
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
