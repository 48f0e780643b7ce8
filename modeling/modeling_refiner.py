"""The optional diffusion decoder (NextFlow section 2.3): paints what the tokenizer's pixel decoder would, with detail.

One of diffusers' denoisers, a UNet or FLUX's transformer, whose input layer is widened for a visual condition: the
semantic and the pixel half of the summed code features and the semantic features decoded from them, projected. The
caption reaches the text side alone, as the paper asks. Trained by flow matching: the output is the velocity
`noise - picture` at `(1 - t) * picture + t * noise`.
"""

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

BASES = {"UNet2DConditionModel": UNet2DConditionModel, "FluxTransformer2DModel": FluxTransformer2DModel}
# How much larger than the picture that its codes show the result may be.
UPSAMPLING = (1, 2)


class NextFlowRefinerConfig(FrozenDict):
    """diffusers' configuration with what transformers' loggers ask of one."""

    def to_dict(self) -> dict:
        """A copy as a plain dictionary."""
        return dict(self)

    def to_json_string(self) -> str:
        """JSON of all entries."""
        return json.dumps(self.to_dict(), indent=2, default=str) + "\n"


@dataclass
class NextFlowRefinerOutput(BaseOutput):
    """What a step of the refiner gives.

    Args:
        sample (`torch.Tensor` of shape `(batch, sample_channels, height, width)`): The velocity.
    """

    sample: torch.Tensor


class NextFlowRefinerModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A denoiser that is told what the codes of a picture say.

    Args:
        base_class (`str`, defaults to `"UNet2DConditionModel"`): diffusers' class that denoises, a name of `BASES`.
        base_config (`dict`, *optional*): Its configuration; the channels of its input and output follow from the rest.
        sample_channels (`int`, defaults to 3): Channels of what is denoised: 3 for pixels, a VAE's for latents.
        patch_size (`int`, defaults to 1): Side of the squares of pixels or latents that become channels; 2 for FLUX.
        semantic_dim (`int`, defaults to 32): Width of the semantic half of the code features.
        pixel_dim (`int`, defaults to 8): Width of the pixel half.
        feature_dim (`int`, defaults to 1152): Width of the decoded semantic features.
        condition_channels (`int`, defaults to 64): Channels that the projected condition takes of the input.
        projector (`str`, defaults to `"linear"`): `"linear"` as for the paper's UNet, `"mlp"` as for its transformers.
        image_condition (`bool`, defaults to `True`): Whether the picture that is refined is an input too: the
            decoder's, or the smaller one to double. The paper names no such input for its first stage.
        image_error (`float`, *optional*): How far that picture is off, as a standard deviation of pixels in [-1, 1] (or
            latents). With it the velocity begins as the best guess from the sample and the picture alone, and the base
            gives what is left in units of its standard deviation: a small base is faithful from the first step on.
        caption_vocab_size (`int`, *optional*): Tokens of a caption that the model embeds itself, for a base without
            text encoders.
        no_caption_tokens (`int`, defaults to 1): So many zeros stand for no caption; as many as captions had in
            training, as joint attention tells how many there are.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm", "pos_embed"]

    @register_to_config
    def __init__(
        self,
        base_class: str = "UNet2DConditionModel",
        base_config: dict | None = None,
        sample_channels: int = 3,
        patch_size: int = 1,
        semantic_dim: int = 32,
        pixel_dim: int = 8,
        feature_dim: int = 1152,
        condition_channels: int = 64,
        projector: str = "linear",
        image_condition: bool = True,
        image_error: float | None = None,
        caption_vocab_size: int | None = None,
        no_caption_tokens: int = 1,
    ):
        super().__init__()
        if base_class not in BASES:
            raise ValueError(f"The base of a refiner is one of {sorted(BASES)}, got {base_class!r}.")
        if caption_vocab_size is not None and base_class == "FluxTransformer2DModel":
            raise ValueError("FLUX attends to a caption's padding too; leave `caption_vocab_size` to a UNet.")
        if projector not in ("linear", "mlp"):
            raise ValueError(f'A projector is "linear" or "mlp", got {projector!r}.')
        if image_error is not None and not (image_condition and image_error > 0):
            raise ValueError(f"`image_error` is above 0 and needs `image_condition`, got {image_error}.")
        channels = sample_channels * patch_size**2
        own = {**(base_config or {}), "in_channels": (1 + image_condition) * channels + condition_channels}
        own["out_channels"] = channels
        self.denoiser = BASES[base_class].from_config(own)
        width = semantic_dim + pixel_dim + feature_dim
        self.condition_proj = nn.Linear(width, condition_channels)
        if projector == "mlp":
            self.condition_proj = nn.Sequential(
                self.condition_proj, nn.GELU(), nn.Linear(condition_channels, condition_channels)
            )
        # Whether the result is as large as the picture, or twice as large.
        self.upsampling_embedding = nn.Embedding(len(UPSAMPLING), condition_channels)
        self.caption_embedding = None
        if caption_vocab_size is not None:
            self.caption_embedding = nn.Embedding(caption_vocab_size, self.text_dim)
            # Stands before every caption, and alone where there is none.
            self.caption_begin = nn.Parameter(0.02 * torch.randn(self.text_dim))
        self.gradient_checkpointing = False

    @property
    def config(self) -> NextFlowRefinerConfig:
        """The configuration, which cannot be changed."""
        return NextFlowRefinerConfig(**self._internal_dict)

    @property
    def text_dim(self) -> int:
        """Width of the caption's states."""
        name = "cross_attention_dim" if self.config.base_class == "UNet2DConditionModel" else "joint_attention_dim"
        return self.denoiser.config[name]

    @property
    def takes_pooled_caption(self) -> bool:
        """Whether the base wants one vector of the caption beside its states, as FLUX and SDXL do."""
        if self.config.base_class == "FluxTransformer2DModel":
            return True
        return self.denoiser.config.addition_embed_type == "text_time"

    @classmethod
    @torch.no_grad()
    def from_base(cls, base: nn.Module, **config) -> "NextFlowRefinerModel":
        """A refiner that begins as a pretrained denoiser: at first the new inputs change nothing.

        Args:
            base: A `UNet2DConditionModel` (SDXL's) or `FluxTransformer2DModel`.
            config: The refiner's own configuration.

        Raises:
            ValueError: If the base is of another class, or its channels are not those of the configuration.
        """
        name = type(base).__name__
        if name not in BASES:
            raise ValueError(f"The base of a refiner is one of {sorted(BASES)}, got {name}.")
        # Names that begin with an underscore tell where the base came from.
        own_config = {key: value for key, value in base.config.items() if not key.startswith("_")}
        model = cls(base_class=name, base_config=own_config, **config)
        channels = model.config.sample_channels * model.config.patch_size**2
        if base.config.in_channels != channels:
            raise ValueError(
                f"The base takes {base.config.in_channels} channels, but {model.config.sample_channels} in patches of "
                f"{model.config.patch_size} make {channels}."
            )
        state = base.state_dict()
        layer = "conv_in" if name == "UNet2DConditionModel" else "x_embedder"
        wide = torch.zeros_like(model.denoiser.state_dict()[f"{layer}.weight"])
        wide[:, :channels] = state[f"{layer}.weight"]
        model.denoiser.load_state_dict({**state, f"{layer}.weight": wide})
        return model.to(base.dtype)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        condition: torch.Tensor,
        image: torch.Tensor | None = None,
        upsampling: int | torch.LongTensor = 1,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        caption_ids: torch.LongTensor | None = None,
        caption_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> NextFlowRefinerOutput | tuple:
        """
        Args:
            sample: `(batch, sample_channels, height, width)`, noised.
            timestep: Of the scheduler, from 0 (no noise) to 1000 (nothing else), one for all or one each.
            condition: `(batch, semantic_dim + pixel_dim + feature_dim, h, w)` on the codes' final grid.
            image: `(batch, sample_channels, height, width)`, the picture that is refined, of the result's size.
                Required with `image_condition`.
            upsampling: 1 or 2, for all or one each: how much larger the result is than what the codes show.
            encoder_hidden_states: `(batch, tokens, text_dim)` of the caption; nothing by default.
            pooled_projections: `(batch, pooled_dim)` of the caption, for a base that takes it; nothing by default.
            caption_ids: `(batch, tokens)` instead of `encoder_hidden_states`, with `caption_vocab_size`.
            caption_mask: `(batch, tokens)`, 0 at the caption's padding.
            guidance: `(batch,)` scale of a base that was distilled to take it; 1 by default.
            return_dict: `False` gives a tuple.

        Raises:
            ValueError: If shapes or inputs do not fit each other or the configuration.
        """
        self._check(sample, condition, image)
        batch = len(sample)
        timestep = torch.as_tensor(timestep, device=sample.device).expand(batch)
        factor = torch.as_tensor(upsampling, device=sample.device).expand(batch)
        if not torch.isin(factor, torch.tensor(UPSAMPLING, device=sample.device)).all():
            raise ValueError(f"`upsampling` is one of {UPSAMPLING}, got {upsampling}.")
        if pooled_projections is not None:
            pooled_projections = pooled_projections.to(sample.dtype)
        states, mask = self._caption_states(batch, sample, encoder_hidden_states, caption_ids, caption_mask)

        # 1. What the input layer sees: the sample, the picture, and what the codes say, all on one grid.
        seen = sample if self.config.image_error is None else self._best_guess(sample, image, timestep / 1000)
        inputs = [F.pixel_unshuffle(seen, self.config.patch_size)]
        if self.config.image_condition:
            inputs.append(F.pixel_unshuffle(image.to(sample.dtype), self.config.patch_size))
        projected = (
            self.condition_proj(condition.to(sample.dtype).movedim(1, -1))
            + self.upsampling_embedding(factor - 1)[:, None, None]
        )
        inputs.append(F.interpolate(projected.movedim(-1, 1), size=inputs[0].shape[-2:], mode="bilinear"))
        hidden_states = torch.cat(inputs, dim=1)

        # 2. The base.
        if self.config.base_class == "UNet2DConditionModel":
            output = self._unet(hidden_states, timestep, states, mask, pooled_projections)
        else:
            output = self._flux(hidden_states, timestep, states, pooled_projections, guidance)
        output = F.pixel_shuffle(output, self.config.patch_size)
        if self.config.image_error is not None:
            output = self._around_image(sample, image, output, timestep / 1000)
        return NextFlowRefinerOutput(sample=output) if return_dict else (output,)

    def velocity_scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """Standard deviation of what is not known of the velocity, at each share of noise `(batch,)`; 1 without
        `image_error`."""
        error = self.config.image_error
        if error is None:
            return torch.ones_like(sigma)
        return error / (((1 - sigma) * error) ** 2 + sigma**2).sqrt()

    def _best_guess(self, sample, image, sigma) -> torch.Tensor:
        """The expected picture given sample and image: near the image in much noise, near the sample in little.

        With x = image + error * a and sample = (1 - t) x + t * noise, a and noise standard normal, what is expected of
        x and of the velocity noise - x is linear in sample and image. A base that is shown this guess in place of the
        sample need not tell noise from the little that the sample says.
        """
        error, t = self.config.image_error, sigma[:, None, None, None].to(sample.dtype)
        image = image.to(sample.dtype)
        gain = (1 - t) * error**2 / (((1 - t) * error) ** 2 + t**2)
        return image + gain * (sample - (1 - t) * image)

    def _around_image(self, sample, image, output, sigma) -> torch.Tensor:
        """The expected velocity given sample and image, and what the base adds to it; see `_best_guess`."""
        error, t = self.config.image_error, sigma[:, None, None, None].to(sample.dtype)
        spread = ((1 - t) * error) ** 2 + t**2
        expected = ((t - (1 - t) * error**2) * sample - t * image.to(sample.dtype)) / spread
        return expected + error / spread.sqrt() * output

    def set_attention_slice(self, slice_size) -> None:
        """As diffusers' UNets: attention of a few heads at a time, for less memory."""
        if hasattr(self.denoiser, "set_attention_slice"):
            self.denoiser.set_attention_slice(slice_size)

    def _unet(self, hidden_states, timestep, states, mask, pooled) -> torch.Tensor:
        added = None
        if self.takes_pooled_caption:
            # SDXL: the vector, and original size, crop and target size in pixels; 8 of them to a latent.
            height, width = (8 * side for side in hidden_states.shape[-2:])
            sizes = hidden_states.new_tensor([height, width, 0, 0, height, width]).expand(len(hidden_states), -1)
            if pooled is None:
                config = self.denoiser.config
                dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                pooled = hidden_states.new_zeros(len(hidden_states), dim)
            added = {"text_embeds": pooled, "time_ids": sizes}
        return self.denoiser(
            hidden_states,
            timestep,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            added_cond_kwargs=added,
        ).sample

    def _flux(self, hidden_states, timestep, states, pooled, guidance) -> torch.Tensor:
        batch, _, height, width = hidden_states.shape
        device, dtype = hidden_states.device, hidden_states.dtype
        sides = (torch.arange(side, device=device, dtype=dtype) for side in (1, height, width))
        positions = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1)
        if self.denoiser.config.guidance_embeds and guidance is None:
            guidance = torch.ones(batch, device=device, dtype=dtype)
        if pooled is None:
            pooled = hidden_states.new_zeros(batch, self.denoiser.config.pooled_projection_dim)
        output = self.denoiser(
            hidden_states=hidden_states.flatten(2).transpose(1, 2),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            # FLUX's own times end at 1.
            timestep=timestep.to(dtype) / 1000,
            img_ids=positions.flatten(0, 2),
            txt_ids=torch.zeros(states.shape[1], 3, device=device, dtype=dtype),
            guidance=guidance,
        ).sample
        return output.transpose(1, 2).unflatten(2, (height, width))

    def _caption_states(self, batch, sample, states, ids, mask):
        if ids is not None and self.caption_embedding is None:
            raise ValueError("This refiner embeds no captions itself; give `encoder_hidden_states`.")
        if states is None and self.caption_embedding is not None:
            states = self.caption_begin.expand(batch, 1, -1)
            if ids is not None:
                own = self.caption_embedding(ids) + _sinusoids(ids.shape[1], self.text_dim, sample)
                states = torch.cat([states, own.to(states.dtype)], dim=1)
                mask = None if mask is None else F.pad(mask, (1, 0), value=1)
        if states is None:
            return sample.new_zeros(batch, self.config.no_caption_tokens, self.text_dim), None
        if len(states) != batch or states.shape[-1] != self.text_dim:
            raise ValueError(
                f"The caption's states must have the shape ({batch}, tokens, {self.text_dim}), got "
                f"{tuple(states.shape)}."
            )
        return states.to(sample.dtype), mask

    def _check(self, sample: torch.Tensor, condition: torch.Tensor, image: torch.Tensor | None) -> None:
        config = self.config
        patch = config.patch_size
        if sample.ndim != 4 or sample.shape[1] != config.sample_channels or any(s % patch for s in sample.shape[-2:]):
            raise ValueError(
                f"`sample` must have the shape (batch, {config.sample_channels}, height, width) with sides that are "
                f"multiples of {patch}, got {tuple(sample.shape)}."
            )
        width = config.semantic_dim + config.pixel_dim + config.feature_dim
        if condition.ndim != 4 or condition.shape[:2] != (len(sample), width):
            raise ValueError(
                f"`condition` must have the shape ({len(sample)}, {width}, h, w), got {tuple(condition.shape)}."
            )
        if config.image_condition and (image is None or image.shape != sample.shape):
            found = None if image is None else tuple(image.shape)
            raise ValueError(f"`image` must have the shape {tuple(sample.shape)} of `sample`, got {found}.")


def refiner_condition(vq_model: nn.Module, codes: torch.LongTensor, grids) -> torch.Tensor:
    """What the codes of pictures of one size say: `(batch, semantic_dim + pixel_dim + feature_dim, h, w)`.

    The summed code features, semantic half first, and the semantic features that the tokenizer decodes from them
    (NextFlow section 2.3).
    """
    features = vq_model.sum_features(codes, grids)
    decoded = vq_model.semantic_decoder(features[:, : vq_model.config.semantic_dim])
    return torch.cat([features, decoded.float().transpose(1, 2).unflatten(2, features.shape[-2:])], dim=1)


def _sinusoids(length: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """The transformer's usual encoding of places, `(length, width)`."""
    half = torch.arange((width + 1) // 2, device=like.device)
    angles = torch.arange(length, device=like.device)[:, None] * 1e4 ** (-half / len(half))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width].to(like.dtype)
