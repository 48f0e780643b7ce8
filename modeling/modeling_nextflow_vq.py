"""The NextFlow image tokenizer: two branches, two codebooks, one shared index, many scales.

Read top to bottom: the codebook (one index, a semantic and a pixel vector), the multi-scale residual quantizer, the
semantic decoder, and the model that joins them with a vision encoder of transformers' and diffusers' VQGAN-style CNNs.
The encoder is SigLIP2, or for TokenFlow's tokenizers CLIP or SigLIP, which take one picture size alone.
Facts and formulas: NextFlow (arXiv 2601.02204) sections 2.1 and 3.1; where it is silent, TokenFlow (arXiv 2412.03069).
Quantization runs in float32 whatever the dtype of the rest.
"""

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionModel,
)
from transformers import initialization as init
from transformers.models.siglip2.modeling_siglip2 import Siglip2Encoder, Siglip2VisionEmbeddings
from transformers.utils import ModelOutput

from .configuration_nextflow import NextFlowVQConfig
from .scale_schedule import Grid

# The nearest-code search holds one (rows, codebook) product at a time and keeps it below this many bytes.
SEARCH_CHUNK_BYTES = 256 * 2**20
# Cells a side up to which a map is resized by products.
_SMALL_MAP = 64


@dataclass
class NextFlowVQEncoding(ModelOutput):
    """Codes of pictures of one size.

    Args:
        codes (`torch.LongTensor` of shape `(batch, num_codes)`):
            Nearest codes of all scales, coarse to fine, each in raster order: the target of drawing.
        input_codes (`torch.LongTensor` of shape `(batch, num_codes)`):
            The codes that were subtracted from the residual. They differ from `codes` where self-correction sampled
            another one, and equal them otherwise.
        features (`torch.FloatTensor` of shape `(batch, code_dim, height, width)`):
            Sum over scales of the looked-up `input_codes`, on the final grid.
        grids (`tuple` of `(height, width)`): The scales.
    """

    codes: torch.LongTensor | None = None
    input_codes: torch.LongTensor | None = None
    features: torch.FloatTensor | None = None
    grids: tuple[Grid, ...] | None = None


@dataclass
class NextFlowVQOutput(ModelOutput):
    """What a training step of the tokenizer needs.

    Args:
        loss (`torch.FloatTensor`): Weighted sum of the four losses below.
        pixel_loss (`torch.FloatTensor`): Mean squared error of the reconstruction.
        semantic_loss (`torch.FloatTensor`): 1 - cosine between decoded and target semantic features.
        codebook_loss (`torch.FloatTensor`): Pull of the codes towards the encoder, mean over scales.
        commitment_loss (`torch.FloatTensor`): Pull of the encoder towards the codes, mean over scales.
        reconstruction (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Decoded picture in [-1, 1].
        semantic_reconstruction (`torch.FloatTensor` of shape `(batch, height * width, hidden_size)`):
            Decoded semantic features.
        codes (`torch.LongTensor` of shape `(batch, num_codes)`): Codes of the scales that were kept.
        latents (`torch.FloatTensor` of shape `(batch, code_dim, height, width)`): What was quantized.
    """

    loss: torch.FloatTensor | None = None
    pixel_loss: torch.FloatTensor | None = None
    semantic_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    semantic_reconstruction: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    latents: torch.FloatTensor | None = None


def upsample(features: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Bicubic resize of a map `(batch, dim, h, w)` to `grid`, without antialiasing; the identity where it fits.

    Small maps as two products, one with the kernel's weights for each row and one for each column: torch's own kernel
    has a thread for each cell of the result, which leaves an accelerator idle over them.
    """
    if features.shape[-2:] == tuple(grid):
        return features
    if features.is_meta or max(*features.shape[-2:], *grid) > _SMALL_MAP:
        return F.interpolate(features, size=tuple(grid), mode="bicubic", align_corners=False)
    # The same codes whatever a trainer allows its products: autocast, or TensorFloat-32.
    exact = torch.float64 if features.is_cuda else torch.promote_types(features.dtype, torch.float32)
    rows, columns = (
        torch.tensor(_bicubic_weights(before, after), dtype=exact, device=features.device)
        for before, after in zip(features.shape[-2:], grid)
    )
    with torch.autocast(features.device.type, enabled=False):
        return (rows @ features.to(exact) @ columns.T).to(features.dtype)


@lru_cache(maxsize=1024)
def _bicubic_weights(before: int, after: int) -> tuple[tuple[float, ...], ...]:
    """What each of `before` cells gives to each of `after`, `(after, before)`: cubic convolution with a = -0.75."""
    table = []
    for cell in range(after):
        place = (cell + 0.5) * before / after - 0.5
        first = math.floor(place)
        weights = [0.0] * before
        for neighbour in range(first - 1, first + 3):
            # Beyond the edge the outermost cell stands.
            weights[min(max(neighbour, 0), before - 1)] += _cubic(abs(place - neighbour))
        table.append(tuple(weights))
    return tuple(table)


def _cubic(distance: float, a: float = -0.75) -> float:
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    if distance < 2:
        return ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return 0.0


def patchify(pixel_values: torch.Tensor, patch: int) -> tuple[torch.Tensor, Grid]:
    """Pixels `(batch, 3, H, W)` -> rows `(batch, h * w, patch * patch * 3)` as SigLIP2's image processor makes them.

    Returns the rows in raster order and the grid (h, w).
    """
    patches = pixel_values.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    grid = (patches.shape[2], patches.shape[4])
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), grid


class DualCodebook(nn.Module):
    """Two embedding tables tied by one index (NextFlow section 2.1, TokenFlow Eq 1-3).

    A code is the pair of l2-normalised rows of both tables, concatenated: semantic part first.
    """

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        self.semantic_dim = config.semantic_dim
        self.pixel_distance_weight = config.pixel_distance_weight
        self.semantic = nn.Embedding(config.codebook_size, config.semantic_dim)
        self.pixel = nn.Embedding(config.codebook_size, config.pixel_dim)
        # Moving average of how often a code is chosen, in multiples of its fair share. Training only.
        self.register_buffer("usage", torch.ones(config.codebook_size))
        # Codes before this one stay as they are while the others are trained. Training only.
        self.num_frozen = 0

    def _apply(self, fn, recurse: bool = True):
        """As `nn.Module`'s, but `half()` and `bfloat16()` leave codes as they are: decoders know them by their hash."""

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            rounds = moved.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(moved.device) if rounds else moved

        return super()._apply(keep, recurse)

    @property
    def size(self) -> int:
        """Number of codes."""
        return self.semantic.num_embeddings

    @torch.no_grad()
    def freeze_rows(self, earlier: "DualCodebook") -> None:
        """Begin with the codes of an `earlier` codebook, and keep them: training moves the ones behind them alone.

        Raises:
            ValueError: If the earlier codebook is larger.
        """
        if earlier.size > self.size:
            raise ValueError(f"{self.size} codes cannot begin with {earlier.size}.")
        self.num_frozen = earlier.size
        for name in ("semantic", "pixel"):
            weight = getattr(self, name).weight
            weight[: earlier.size] = getattr(earlier, name).weight
            weight.register_hook(self._without_frozen_rows)

    def _without_frozen_rows(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.arange(self.num_frozen, device=gradient.device), 0.0)

    def table(self) -> torch.Tensor:
        """All codes, float32 of shape `(codebook_size, code_dim)`."""
        return torch.cat(
            [F.normalize(self.semantic.weight.float(), dim=-1), F.normalize(self.pixel.weight.float(), dim=-1)], dim=-1
        )

    def normalize(self, features: torch.Tensor) -> torch.Tensor:
        """l2-normalise the semantic and the pixel part of `(..., code_dim)` each on its own."""
        semantic, pixel = features.split([self.semantic_dim, features.shape[-1] - self.semantic_dim], dim=-1)
        return torch.cat([F.normalize(semantic, dim=-1), F.normalize(pixel, dim=-1)], dim=-1)

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes of any shape -> float32 vectors of shape `(*codes.shape, code_dim)`.

        Only the rows asked for are normalised.
        """
        return torch.cat(
            [
                F.normalize(self.semantic(codes).float(), dim=-1),
                F.normalize(self.pixel(codes).float(), dim=-1),
            ],
            dim=-1,
        )

    def nearest(self, features: torch.Tensor, table: torch.Tensor, top_k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The `top_k` nearest codes of normalised `features`.

        Between unit vectors ||a - b||^2 = 2 - 2 a.b, so the weighted sum of both distances is least where the
        weighted sum of both inner products is greatest: one matrix product, in chunks of rows.

        Args:
            features: `(rows, code_dim)`, normalised.
            table: `(codebook_size, code_dim)` from [`table`].
            top_k: How many codes per row, nearest first.

        Returns:
            Distances and codes, both `(rows, top_k)`.
        """
        weights = table.new_ones(table.shape[-1])
        weights[self.semantic_dim :] = self.pixel_distance_weight
        keys = (table * weights).T
        rows_per_chunk = max(1, SEARCH_CHUNK_BYTES // (table.element_size() * table.shape[0]))
        similarities, codes = [], []
        for rows in features.split(rows_per_chunk):
            # In full precision whatever the rest trains in: neighbouring codes differ by less than bfloat16 tells.
            with torch.autocast(rows.device.type, enabled=False):
                product = rows @ keys
            if top_k == 1:
                best, index = product.max(dim=-1, keepdim=True)
            else:
                best, index = product.topk(top_k, dim=-1)
            similarities.append(best)
            codes.append(index)
        return 2 * (1 + self.pixel_distance_weight) - 2 * torch.cat(similarities), torch.cat(codes)


class _FallsBackToSdpa:
    """Takes SDPA where the whole model is asked for an attention that a vision encoder cannot do."""

    _supports_flash_attn = True
    _supports_flex_attn = True

    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        if requested_attention not in (None, "eager", "sdpa"):
            requested_attention = "sdpa"
        return super().get_correct_attn_implementation(requested_attention, *args, **kwargs)


class Siglip2SemanticEncoder(_FallsBackToSdpa, Siglip2VisionModel):
    """SigLIP2 on pictures of any size."""

    def features(self, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
        """Pixels `(batch, 3, H, W)` in [-1, 1] -> the hidden states of a layer, `(batch, h * w, hidden_size)`."""
        return siglip2_features(self, pixel_values, layer)


class SiglipSemanticEncoder(_FallsBackToSdpa, SiglipVisionModel):
    """SigLIP on pictures of its one size."""

    def features(self, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
        """Pixels `(batch, 3, S, S)` in [-1, 1] -> the hidden states of a layer, `(batch, h * w, hidden_size)`."""
        return self(pixel_values.clamp(-1, 1), output_hidden_states=True).hidden_states[layer]


class ClipSemanticEncoder(_FallsBackToSdpa, CLIPVisionModel):
    """CLIP on pictures of its one size, in [-1, 1] as TokenFlow gives them, not with CLIP's own mean and deviation."""

    def features(self, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
        """Pixels `(batch, 3, S, S)` in [-1, 1] -> the normed hidden states of the patches at a layer,
        `(batch, h * w, hidden_size)`."""
        return self.post_layernorm(self(pixel_values, output_hidden_states=True).hidden_states[layer][:, 1:])


SEMANTIC_ENCODERS = {
    own.config_class.model_type: own for own in (Siglip2SemanticEncoder, SiglipSemanticEncoder, ClipSemanticEncoder)
}


def siglip2_features(encoder: Siglip2VisionModel, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
    """Pixels `(batch, 3, H, W)` in [-1, 1] -> a SigLIP2's hidden states of a layer, `(batch, h * w, hidden_size)`."""
    patches, grid = patchify(pixel_values, encoder.config.patch_size)
    outputs = encoder(
        pixel_values=patches,
        pixel_attention_mask=None,
        # One shape for all of them: positions are resized once, and not picture by picture.
        spatial_shapes=torch.tensor([grid]),
        output_hidden_states=True,
    )
    return outputs.hidden_states[layer]


class SemanticDecoder(nn.Module):
    """Transformer from the semantic part of the codes back to the semantic encoder's features.

    A training target and the refiner's condition; drawing does not need it.
    """

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        encoder, decoder_config = config.vision_config, self._config(config)
        decoder_config._attn_implementation = "eager" if encoder._attn_implementation == "eager" else "sdpa"
        width = decoder_config.hidden_size
        self.grid_side = int(decoder_config.num_patches**0.5)
        self.in_proj = nn.Linear(config.semantic_dim, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.semantic_decoder_class_token else None
        self.position_embedding = nn.Embedding(decoder_config.num_patches, width)
        self.encoder = Siglip2Encoder(decoder_config)
        self.norm = nn.LayerNorm(width, eps=decoder_config.layer_norm_eps)
        target_dim = config.semantic_target_dim or encoder.hidden_size
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, target_dim))

    @staticmethod
    def _config(config: NextFlowVQConfig) -> Siglip2VisionConfig:
        """A SigLIP2 of the semantic encoder's shape, but for the number of layers and what the configuration says."""
        encoder = config.vision_config
        if config.image_size is None:
            shape = encoder.to_dict()
        else:
            names = ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
            shape = {name: getattr(encoder, name) for name in names} | {"num_patches": max(config.sides) ** 2}
        layers = {"num_hidden_layers": config.semantic_decoder_layers}
        return Siglip2VisionConfig(**{**shape, **layers, **(config.semantic_decoder_config or {})})

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, semantic_dim, h, w)` -> `(batch, h * w, target_dim)`."""
        grid = features.shape[-2:]
        positions = Siglip2VisionEmbeddings.resize_positional_embeddings(
            self.position_embedding.weight.reshape(self.grid_side, self.grid_side, -1),
            torch.tensor([grid]),
            max_length=grid[0] * grid[1],
        )
        hidden_states = self.in_proj(features.flatten(2).transpose(1, 2).to(self.in_proj.weight.dtype)) + positions
        if self.class_token is not None:
            hidden_states = torch.cat([self.class_token.expand(len(features), -1, -1), hidden_states], dim=1)
        hidden_states = self.encoder(inputs_embeds=hidden_states, attention_mask=None).last_hidden_state
        return self.head(self.norm(hidden_states[:, -grid[0] * grid[1] :]))


class NextFlowVQPreTrainedModel(PreTrainedModel):
    config: NextFlowVQConfig
    base_model_prefix = "vq_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = False
    # The decoder that the tokenizer is part of may be given any of these; its own towers fall back to SDPA.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # encode() and decode() use parameters of several sub-modules outside their own forward.
    _no_split_modules = ["NextFlowVQModel"]
    _keep_in_fp32_modules_strict = ["codebook"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, DualCodebook):
            init.normal_(module.semantic.weight)
            init.normal_(module.pixel.weight)
            init.ones_(module.usage)


def saved_config(path, kwargs: dict) -> dict:
    """The configuration of a checkpoint as it was saved; empty where there is none.

    `kwargs` are those of `from_pretrained`, of which the ones that say where to look are used.
    """
    names = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
    try:
        return PreTrainedConfig.get_config_dict(path, **{name: kwargs[name] for name in names if name in kwargs})[0]
    except OSError:
        # Nothing there: loading says so, or does without where a configuration is given.
        return {}


def check_model_type(model_class: type[PreTrainedModel], path, kwargs: dict) -> None:
    """Raise `ValueError` if a checkpoint is of another kind, where transformers would warn and draw new weights."""
    if path is None:
        return
    found, wanted = saved_config(path, kwargs).get("model_type"), model_class.config_class.model_type
    if found not in (None, wanted):
        raise ValueError(f"{path} is a checkpoint of the kind {found!r}, and {model_class.__name__} is {wanted!r}.")


class NextFlowVQModel(NextFlowVQPreTrainedModel):
    """The dual-codebook multi-scale image tokenizer: [`encode`] pixels to codes, [`decode`] codes to pixels."""

    # Of a whole NextFlow all but its tokenizer.
    _keys_to_ignore_on_load_unexpected = [r"^model\.(?!vq_model\.)", r"^lm_head\."]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """As in transformers; of the checkpoint of a whole NextFlow, its image tokenizer alone.

        Raises:
            ValueError: If it is a checkpoint of another kind.
        """
        if pretrained_model_name_or_path is not None:
            saved = saved_config(pretrained_model_name_or_path, kwargs)
            if saved.get("model_type") == "nextflow":
                config = NextFlowVQConfig.from_dict(saved["vq_config"]) if config is None else config
                kwargs = {"key_mapping": {r"^model\.vq_model\.": ""}, **kwargs}
                loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
                # Saved anew it is a tokenizer alone; transformers would give its weights their names in the whole back.
                vars(loaded[0] if isinstance(loaded, tuple) else loaded).pop("_weight_conversions", None)
                return loaded
            check_model_type(cls, pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def __init__(self, config: NextFlowVQConfig):
        super().__init__(config)
        # Here and not above: diffusers takes a second to import, which registration should not cost.
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        levels = len(config.encoder_channels)
        self.schedule = config.schedule
        self.semantic_encoder = SEMANTIC_ENCODERS[config.vision_config.model_type]._from_config(config.vision_config)
        width = config.vision_config.hidden_size
        self.semantic_proj = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.semantic_dim))
        self.pixel_encoder = Encoder(
            in_channels=config.num_channels,
            out_channels=config.latent_channels,
            down_block_types=_cnn_blocks("Down", levels, config.pixel_attention),
            block_out_channels=tuple(config.encoder_channels),
            layers_per_block=config.encoder_layers,
            norm_num_groups=config.norm_num_groups,
            double_z=False,
            mid_block_add_attention=config.pixel_attention,
        )
        self.pixel_proj = nn.Conv2d(config.latent_channels, config.pixel_dim, 1)
        self.codebook = DualCodebook(config)
        self.semantic_decoder = SemanticDecoder(config)
        self.post_pixel_proj = nn.Conv2d(config.pixel_dim, config.latent_channels, 1)
        self.pixel_decoder = Decoder(
            in_channels=config.latent_channels,
            out_channels=config.num_channels,
            up_block_types=_cnn_blocks("Up", levels, config.pixel_attention),
            block_out_channels=tuple(config.decoder_channels),
            layers_per_block=config.decoder_layers,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.pixel_attention,
        )
        self.post_init()

    # ---- encoding ----------------------------------------------------------------------------------------------------

    def semantic_features(self, pixel_values: torch.Tensor, encoder: Siglip2VisionModel | None = None) -> torch.Tensor:
        """Hidden states of the semantic encoder, `(batch, h * w, hidden_size)`, for pixels `(batch, 3, H, W)`.

        `encoder` may be another SigLIP2 of the same shape: a frozen teacher.
        """
        if encoder is not None:
            return siglip2_features(encoder, pixel_values, self.config.semantic_layer)
        return self.semantic_encoder.features(pixel_values, self.config.semantic_layer)

    def latents(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is quantized: `(batch, code_dim, h, w)` in float32, and the semantic features it came from."""
        self._check_pixels(pixel_values)
        pixel_values = pixel_values.to(self.post_pixel_proj.weight.dtype)
        semantic_features = self.semantic_features(pixel_values)
        if self.config.image_size is not None:
            cells = self.config.image_size // self.config.vision_config.patch_size
            pixel_values = upsample(pixel_values, self.schedule.image_size((cells, cells)))
        pixel = self.pixel_proj(self.pixel_encoder(pixel_values))
        semantic = self.semantic_proj(semantic_features).transpose(1, 2).unflatten(2, pixel.shape[-2:])
        return torch.cat([semantic, pixel], dim=1).float(), semantic_features

    @torch.no_grad()
    def encode(
        self,
        pixel_values: torch.Tensor,
        grids: Sequence[Grid] | None = None,
        top_k: int | None = None,
        corruption: float = 0.6,
        generator: torch.Generator | None = None,
    ) -> NextFlowVQEncoding:
        """Pictures of one size -> the codes of all their scales.

        Args:
            pixel_values: `(batch, 3, height, width)` in [-1, 1]; sides are multiples of the downsampling factor.
            grids: The scales; by default those of the schedule for this size.
            top_k: For self-correction (NextFlow sections 2.2 and 4): at a share of the positions, subtract a code
                drawn from the `top_k` nearest instead of the nearest one, so that later scales learn to repair it.
            corruption: Share of each scale's positions that self-correction samples; unused without `top_k`.
            generator: Source of that randomness, on the CPU.

        Raises:
            ValueError: If pixels or grids are not a picture of this tokenizer.
        """
        latents, _ = self.latents(pixel_values)
        grids = self._check_grids(grids, latents.shape[-2:])
        if top_k is not None and not 1 <= top_k <= self.codebook.size:
            raise ValueError(f"`top_k` must lie in 1..{self.codebook.size}, got {top_k}.")
        if not 0 <= corruption <= 1:
            raise ValueError(f"`corruption` must lie in [0, 1], got {corruption}.")
        table = self.codebook.table()
        residual, features = latents, torch.zeros_like(latents)
        codes, input_codes = [], []
        for grid in grids:
            vectors = self.codebook.normalize(_pool(residual, grid))
            distances, nearest = self.codebook.nearest(vectors, table, top_k or 1)
            target = chosen = nearest[:, 0]
            if top_k is not None:
                chosen = _sample_near(distances, nearest, corruption, generator)
            upsampled = upsample(_to_map(table[chosen], len(latents), grid), latents.shape[-2:])
            features = features + upsampled
            residual = residual - upsampled
            codes.append(target.view(len(latents), -1))
            input_codes.append(chosen.view(len(latents), -1))
        return NextFlowVQEncoding(
            codes=torch.cat(codes, dim=1), input_codes=torch.cat(input_codes, dim=1), features=features, grids=grids
        )

    @torch.no_grad()
    def nearest_codes(self, features: torch.Tensor, grid: Grid) -> torch.LongTensor:
        """Codes `(batch, h, w)` of one scale that are nearest to features `(batch, code_dim, H, W)`."""
        vectors = self.codebook.normalize(_pool(features, grid))
        return self.codebook.nearest(vectors, self.codebook.table())[1][:, 0].view(len(features), *grid)

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def split_codes(self, codes: torch.LongTensor, grids: Sequence[Grid]) -> list[torch.LongTensor]:
        """`(batch, num_codes)` -> one `(batch, h_k, w_k)` per scale; the codes may end after any whole scale."""
        sizes, total = [], 0
        for height, width in grids:
            if total == codes.shape[1]:
                break
            sizes.append(height * width)
            total += sizes[-1]
        if total != codes.shape[1] or not sizes:
            raise ValueError(
                f"{codes.shape[1]} codes do not end with a whole scale of {list(grids)} "
                f"(cumulative: {[sum(h * w for h, w in grids[: k + 1]) for k in range(len(grids))]})."
            )
        return [scale.unflatten(1, grid) for scale, grid in zip(codes.split(sizes, dim=1), grids)]

    def sum_features(self, codes: torch.LongTensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Sum over scales of the looked-up codes on the final grid: float32 `(batch, code_dim, H, W)`.

        Args:
            codes: `(batch, num_codes)`, all scales or a prefix of whole scales.
            grids: All scales of the picture, so that a prefix too is laid out on the final grid.

        Raises:
            ValueError: If a code is out of range or the codes do not fit the grids.
        """
        self._check_codes(codes)
        maps = (self.codebook.lookup(scale).permute(0, 3, 1, 2) for scale in self.split_codes(codes, grids))
        return sum(upsample(features, grids[-1]) for features in maps)

    def decode_features(self, features: torch.Tensor) -> torch.Tensor:
        """Summed code features `(batch, code_dim, h, w)` -> pixels `(batch, 3, H, W)`, nominally in [-1, 1]."""
        pixel = features[:, self.config.semantic_dim :].to(self.post_pixel_proj.weight.dtype)
        pixels = self.pixel_decoder(self.post_pixel_proj(pixel))
        size = self.config.image_size
        return pixels if size is None else upsample(pixels, (size, size))

    @torch.no_grad()
    def decode(self, codes: torch.LongTensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Codes of pictures of one size -> pixels `(batch, 3, H, W)` in [-1, 1].

        Args:
            codes: `(batch, num_codes)`; a prefix of whole scales gives a preview at full size.
            grids: All scales of the picture.

        Raises:
            ValueError: If a code is out of range or the codes do not fit the grids.
        """
        return self.decode_features(self.sum_features(codes, grids)).clamp(-1, 1)

    # ---- what the decoder is fed -------------------------------------------------------------------------------------

    def scale_inputs(
        self, codes: Sequence[torch.LongTensor], grids: Sequence[Grid], visual_input: str = "residual"
    ) -> torch.Tensor:
        """Features at the slots of the next scale, given the codes of all scales before it.

        Args:
            codes: Codes of the scales 1..k, each `(batch, h, w)`.
            grids: The scales 1..k+1 (or more).
            visual_input: `"residual"`: the codes of scale k alone, resized to scale k+1 (NextFlow section 2.2).
                `"accumulated"`: the running sum, resized step by step (TokenFlow).

        Returns:
            float32 `(batch, h_{k+1} * w_{k+1}, code_dim)`.
        """
        if visual_input == "residual":
            features = upsample(self.codebook.lookup(codes[-1]).permute(0, 3, 1, 2), grids[len(codes)])
        else:
            features = 0
            for scale, grid in zip(codes, grids[1:]):
                features = upsample(self.codebook.lookup(scale).permute(0, 3, 1, 2) + features, grid)
        return features.flatten(2).transpose(1, 2)

    # ---- training ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: torch.Tensor,
        semantic_targets: torch.Tensor | None = None,
        quantize: bool = True,
        generator: torch.Generator | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> NextFlowVQOutput:
        """Quantize and reconstruct, with the losses of TokenFlow Eq 4 (NextFlow does not restate them).

        Args:
            pixel_values: `(batch, 3, height, width)` in [-1, 1].
            semantic_targets: `(batch, h * w, hidden_size)` features to reconstruct, usually of a frozen teacher;
                by default the (detached) features of the model's own encoder.
            quantize: `False` passes the latents through unquantized, to warm up the pixel branch.
            generator: Source of the scale dropout, on the CPU.
            return_dict: `False` gives a tuple.
        """
        latents, semantic_features = self.latents(pixel_values)
        if quantize:
            features, codes, codebook_loss, commitment_loss = self._quantize_for_training(latents, generator)
        else:
            features = self.codebook.normalize(latents.movedim(1, -1)).movedim(-1, 1)
            codes, codebook_loss, commitment_loss = None, latents.new_zeros(()), latents.new_zeros(())
        reconstruction = self.decode_features(features)
        decoded_semantic = self.semantic_decoder(features[:, : self.config.semantic_dim])
        targets = semantic_features.detach() if semantic_targets is None else semantic_targets
        if targets.shape != decoded_semantic.shape:
            raise ValueError(
                f"`semantic_targets` must have the shape {tuple(decoded_semantic.shape)}, got {tuple(targets.shape)}."
            )
        pixel_loss = F.mse_loss(reconstruction.float(), pixel_values.float())
        semantic_loss = 1 - F.cosine_similarity(decoded_semantic.float(), targets.float(), dim=-1).mean()
        loss = (
            pixel_loss
            + self.config.semantic_weight * semantic_loss
            + codebook_loss
            + self.config.commitment_weight * commitment_loss
        )
        output = NextFlowVQOutput(
            loss=loss,
            pixel_loss=pixel_loss.detach(),
            semantic_loss=semantic_loss.detach(),
            codebook_loss=codebook_loss.detach(),
            commitment_loss=commitment_loss.detach(),
            reconstruction=reconstruction,
            semantic_reconstruction=decoded_semantic,
            codes=codes,
            latents=latents,
        )
        return output if return_dict in (None, True) else output.to_tuple()

    @torch.no_grad()
    def start_codebook(self, pictures: Sequence[torch.Tensor], generator: torch.Generator) -> None:
        """Put the codes onto encoder outputs of all scales, random ones of these pictures.

        Scales are visited coarse to fine, each on the residual that the codes chosen so far leave.

        Args:
            pictures: Pixels in batches `(batch, 3, H, W)`, each of one size.
            generator: Source of the choice.
        """
        residuals = [self.latents(pixels)[0] for pixels in pictures]
        grids = [self._check_grids(None, own.shape[-2:]) for own in residuals]
        shares = torch.linspace(0, self.codebook.size, max(map(len, grids)) + 1).round().long().tolist()
        for scale, (first, end) in enumerate(pairwise(shares)):
            # Pictures of a lower level have fewer scales.
            members = [batch for batch, own in enumerate(grids) if scale < len(own)]
            vectors = [self.codebook.normalize(_pool(residuals[batch], grids[batch][scale])) for batch in members]
            candidates = torch.cat(vectors)
            picks = torch.randint(len(candidates), (end - first,), generator=generator)
            self._move_codes(torch.arange(first, end), candidates[picks])
            table = self.codebook.table()[:end]
            for batch, own in zip(members, vectors):
                nearest = self.codebook.nearest(own, table)[1][:, 0]
                quantized = _to_map(table[nearest], len(residuals[batch]), grids[batch][scale])
                residuals[batch] = residuals[batch] - upsample(quantized, residuals[batch].shape[-2:])

    @torch.no_grad()
    def extend_codebook(self, pictures: Sequence[torch.Tensor], generator: torch.Generator) -> None:
        """Put the codes that are not frozen onto encoder outputs that the frozen ones fit worst.

        Pictures that the frozen codes show well keep their codes that way.

        Args:
            pictures: Pixels `(batch, 3, H, W)`, a batch for each size.
            generator: Source of the choice: an output is taken with a weight of its squared distance.
        """
        first = self.codebook.num_frozen
        table = self.codebook.table()[:first]
        vectors, distances = [], []
        for pixels in pictures:
            residual, _ = self.latents(pixels)
            for grid in self._check_grids(None, residual.shape[-2:]):
                vectors.append(self.codebook.normalize(_pool(residual, grid)))
                distance, nearest = self.codebook.nearest(vectors[-1], table)
                distances.append(distance[:, 0])
                quantized = _to_map(table[nearest[:, 0]], len(residual), grid)
                residual = residual - upsample(quantized, residual.shape[-2:])
        picks = torch.multinomial(torch.cat(distances) ** 2, self.codebook.size - first, generator=generator)
        self._move_codes(torch.arange(first, self.codebook.size), torch.cat(vectors)[picks])

    def _move_codes(self, codes: torch.LongTensor, vectors: torch.Tensor) -> None:
        semantic, pixel = vectors.split([self.config.semantic_dim, self.config.pixel_dim], dim=-1)
        self.codebook.semantic.weight[codes] = semantic.to(self.codebook.semantic.weight)
        self.codebook.pixel.weight[codes] = pixel.to(self.codebook.pixel.weight)
        self.codebook.usage[codes] = 1.0

    def _quantize_for_training(self, latents: torch.Tensor, generator: torch.Generator | None):
        """Straight-through residual quantization with scale dropout and revival of dead codes."""
        grids = self._check_grids(None, latents.shape[-2:])
        keep = torch.rand(len(grids), generator=generator) >= self.config.scale_dropout
        keep[0] = True
        if not self.training:
            keep[:] = True
        kept = [grid for grid, kept_ in zip(grids, keep.tolist()) if kept_]
        residual, features = latents, 0
        all_codes, all_vectors, all_distances, codebook_losses, commitment_losses = [], [], [], [], []
        table = self.codebook.table().detach()
        for grid in kept:
            vectors = self.codebook.normalize(_pool(residual, grid))
            with torch.no_grad():
                distances, codes = (own[:, 0] for own in self.codebook.nearest(vectors, table))
            quantized = self.codebook.lookup(codes)
            codebook_losses.append(F.mse_loss(quantized, vectors.detach()))
            commitment_losses.append(F.mse_loss(vectors, quantized.detach()))
            straight_through = vectors + (quantized - vectors).detach()
            upsampled = upsample(_to_map(straight_through, len(latents), grid), latents.shape[-2:])
            features = features + upsampled
            residual = residual - upsampled.detach()
            all_codes.append(codes)
            all_vectors.append(vectors.detach())
            all_distances.append(distances)
        if self.training:
            self._revive_dead_codes(torch.cat(all_codes), torch.cat(all_vectors), torch.cat(all_distances), generator)
        codes = torch.cat([codes.view(len(latents), -1) for codes in all_codes], dim=1)
        return features, codes, torch.stack(codebook_losses).mean(), torch.stack(commitment_losses).mean()

    @torch.no_grad()
    def _revive_dead_codes(
        self,
        codes: torch.Tensor,
        vectors: torch.Tensor,
        distances: torch.Tensor,
        generator: torch.Generator | None,
    ):
        """Track how often each code is chosen; move the unused ones onto current encoder outputs.

        Beside frozen codes, which stay, onto those that all codes fit worst.
        """
        codebook = self.codebook
        counts = torch.bincount(codes, minlength=codebook.size).to(codebook.usage)
        codebook.usage.lerp_(counts * (codebook.size / codes.numel()), 0.02)
        dead = (codebook.usage < self.config.dead_code_threshold).nonzero()[:, 0]
        dead = dead[dead >= codebook.num_frozen]
        if len(dead) == 0:
            return
        if codebook.num_frozen:
            picks = torch.multinomial(distances.cpu() ** 2 + 1e-12, len(dead), replacement=True, generator=generator)
        else:
            picks = torch.randint(len(vectors), (len(dead),), generator=generator)
        self._move_codes(dead, vectors[picks.to(vectors.device)])

    # ---- identity and checks -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Hash of both code tables, the same in float32 and bfloat16, whole and sharded."""
        digest = hashlib.sha256()
        for table in (self.codebook.semantic.weight, self.codebook.pixel.weight):
            if hasattr(table, "full_tensor"):  # a DTensor, whose class is slow to import
                table = table.full_tensor()
            digest.update(table.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        channels, patch = self.config.num_channels, self.config.downsample
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or not pixel_values.is_floating_point():
            raise ValueError(
                f"Expected float pixels of shape (batch, {channels}, height, width), got {pixel_values.dtype} of shape "
                f"{tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[-2:]
        size = self.config.image_size
        if size is not None and (height, width) != (size, size):
            raise ValueError(f"This tokenizer takes pictures of {size}x{size} pixels alone, got {height}x{width}.")
        if size is None and (min(height, width) < patch or height % patch or width % patch):
            raise ValueError(f"Picture sides must be positive multiples of {patch} pixels, got {height}x{width}.")
        if not torch.isfinite(pixel_values).all():
            raise ValueError("The pixels hold NaN or infinite values.")

    def _check_grids(self, grids: Sequence[Grid] | None, final_grid: Sequence[int]) -> tuple[Grid, ...]:
        if grids is None:
            height, width = self.schedule.image_size(tuple(final_grid))
            return self.schedule.grids_for_size(height, width)
        grids = tuple((int(h), int(w)) for h, w in grids)
        self.schedule.check_grids(grids)
        if grids[-1] != tuple(final_grid):
            raise ValueError(f"The last scale is {grids[-1]}, but the picture has a grid of {tuple(final_grid)}.")
        return grids

    def _check_codes(self, codes: torch.LongTensor) -> None:
        if codes.ndim != 2 or codes.is_floating_point():
            raise ValueError(f"Expected integer codes of shape (batch, num_codes), got {codes.dtype} {codes.shape}.")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook.size):
            raise ValueError(
                f"Codes must lie in 0..{self.codebook.size - 1}, got {codes.min().item()}..{codes.max().item()}."
            )


class OwnsImageTokenizer:
    """A decoder's tie to its image tokenizer, `model.vq_model`: loaded, exchanged and checked together.

    It is frozen in the decoder: training must leave the codes what they are. Its own stages train it by itself.
    """

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; refuses a checkpoint of another kind, or with another tokenizer than its decoder's."""
        check_model_type(cls, args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        placed = getattr(model, "hf_device_map", {})
        if placed and model.vq_model.device.type == "meta":
            raise ValueError(
                f"The device map {placed} leaves the image tokenizer where it cannot be used. It is small: place "
                "`model.vq_model` on a device, and let layers of `model.language_model` go elsewhere."
            )
        model.check_vq_model()
        # Loaded weights are trainable, whatever they were when the model was made.
        model.vq_model.requires_grad_(False)
        return loaded

    @classmethod
    def _from_config(cls, config, **kwargs):
        """As in transformers; new weights are tied to no tokenizer, whatever the configuration's own were."""
        config = copy.deepcopy(config)
        config.codebook_fingerprint = None
        return super()._from_config(config, **kwargs)

    @property
    def vq_model(self) -> NextFlowVQModel:
        """The image tokenizer. Assigning another one checks that the decoder was trained with it."""
        return self.model.vq_model

    def set_vq_model(self, vq_model: NextFlowVQModel) -> None:
        """Replace the image tokenizer, for example by one with a larger pixel decoder.

        Raises:
            ValueError: If its codebook is not the one that this decoder was trained with.
        """
        self.check_vq_model(vq_model)
        self.model.vq_model = vq_model.requires_grad_(False)
        self.config.vq_config = vq_model.config

    def check_vq_model(self, vq_model: NextFlowVQModel | None = None) -> None:
        """Raise `ValueError` unless the tokenizer's codebook has the fingerprint that the checkpoint records."""
        vq_model = self.model.vq_model if vq_model is None else vq_model
        expected = self.config.codebook_fingerprint
        if expected is None or vq_model.codebook.semantic.weight.device.type == "meta":
            return
        found = vq_model.fingerprint()
        if found != expected:
            raise ValueError(
                f"This decoder was trained with the image tokenizer {expected}, but its tokenizer now has the codebook "
                f"{found}: it would draw noise. Use the tokenizer of the decoder's own checkpoint, or train the "
                "decoder on this one and set `config.codebook_fingerprint = vq_model.fingerprint()`."
            )


def _cnn_blocks(direction: str, levels: int, attention: bool) -> tuple[str, ...]:
    """diffusers' block names of a VQGAN-style CNN that attends at its lowest resolution alone."""
    plain, attending = f"{direction}EncoderBlock2D", f"Attn{direction}EncoderBlock2D"
    if direction == "Up":
        plain, attending = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
    lowest = attending if attention else plain
    rest = (plain,) * (levels - 1)
    return (*rest, lowest) if direction == "Down" else (lowest, *rest)


def _pool(features: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Area-downsample `(batch, dim, H, W)` to `grid` and lay the positions out as rows `(batch * h * w, dim)`."""
    pooled = F.interpolate(features, size=tuple(grid), mode="area")
    return pooled.permute(0, 2, 3, 1).flatten(0, 2)


def _to_map(rows: torch.Tensor, batch: int, grid: Grid) -> torch.Tensor:
    """Rows `(batch * h * w, dim)` -> `(batch, dim, h, w)`."""
    return rows.view(batch, *grid, -1).permute(0, 3, 1, 2)


def _sample_near(
    distances: torch.Tensor, codes: torch.Tensor, share: float, generator: torch.Generator | None
) -> torch.Tensor:
    """At a `share` of the rows draw one of their near codes with weight softmax(-distance); elsewhere the nearest.

    The paper names a multinomial over the top-k and states neither k nor the weights.
    """
    weights = torch.softmax(-distances, dim=-1).cpu()
    draw = torch.multinomial(weights, 1, generator=generator).to(codes.device)
    chosen = codes.gather(1, draw)[:, 0]
    corrupt = (torch.rand(len(codes), generator=generator) < share).to(codes.device)
    return torch.where(corrupt, chosen, codes[:, 0])
