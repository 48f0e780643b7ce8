"""Configurations of the NextFlow tokenizer and decoder, and the two presets `nextflow-7b` and `nextflow-mini`."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from .scale_schedule import (
    MINI_FINAL_GRIDS,
    MINI_LEVELS,
    MINI_SIDES,
    NEXTFLOW_FINAL_GRIDS,
    NEXTFLOW_LEVELS,
    NEXTFLOW_SIDES,
    ScaleSchedule,
    read_blocks,
)

# Saving adds the class that is saved; these make the other Auto classes work as well.
_AUTO_MAP = {
    "AutoModel": "modeling_nextflow.NextFlowModel",
    "AutoModelForCausalLM": "modeling_nextflow.NextFlowForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_nextflow.NextFlowForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_nextflow.NextFlowForConditionalGeneration",
}
# What an image that something follows shows to it.
CONTEXT_IMAGES = ("scales", "scales+final", "final")
# Semantic encoders by the `model_type` of their configuration.
VISION_CONFIGS = {own.model_type: own for own in (Siglip2VisionConfig, SiglipVisionConfig, CLIPVisionConfig)}
ABILITIES = ("text", "image", "caption", "edit", "interleaved")


@strict
class NextFlowVQConfig(PreTrainedConfig):
    r"""
    Configuration of [`NextFlowVQModel`], the dual-codebook image tokenizer (NextFlow section 2.1).

    Args:
        vision_config (`dict`, `Siglip2VisionConfig`, `SiglipVisionConfig` or `CLIPVisionConfig`, *optional*):
            The semantic encoder; a `dict` names its kind by `model_type`, SigLIP2 where there is none. SigLIP2 takes
            pictures of any size, and its patch size is the tokenizer's downsampling factor. The others (TokenFlow's)
            take their `image_size` alone, so the schedule ends with their grid of patches.
        semantic_layer (`int`, *optional*, defaults to -2):
            Which of the semantic encoder's hidden states is tokenized, and is the target of its reconstruction.
        codebook_size (`int`, *optional*, defaults to 32768):
            Number of codes. One index selects a semantic and a pixel vector.
        semantic_dim (`int`, *optional*, defaults to 32): Width of the semantic part of a code.
        pixel_dim (`int`, *optional*, defaults to 8): Width of the pixel part of a code.
        pixel_distance_weight (`float`, *optional*, defaults to 1.0):
            Weight of the pixel distance in the shared nearest-code search (TokenFlow's w_dis).
        num_channels (`int`, *optional*, defaults to 3): Colour channels of a picture.
        latent_channels (`int`, *optional*, defaults to 256): Channels between the CNNs and the code projections.
        encoder_channels (`list[int]`, *optional*): Widths of the pixel encoder's levels, fine to coarse.
        encoder_layers (`int`, *optional*, defaults to 2): Residual blocks per level of the pixel encoder.
        decoder_channels (`list[int]`, *optional*): Widths of the pixel decoder's levels, fine to coarse.
        decoder_layers (`int`, *optional*, defaults to 2):
            Residual blocks per level of the pixel decoder, less one.
        norm_num_groups (`int`, *optional*, defaults to 32): Groups of the CNNs' group norms.
        pixel_attention (`bool`, *optional*, defaults to `True`):
            Whether the CNNs attend over space at their lowest resolution.
        semantic_decoder_layers (`int`, *optional*, defaults to 3): Transformer layers of the semantic decoder.
        semantic_decoder_config (`dict`, *optional*):
            What of a `Siglip2VisionConfig` the semantic decoder has otherwise than the semantic encoder.
        semantic_decoder_class_token (`bool`, *optional*, defaults to `False`):
            Whether a learned token stands before the semantic decoder's sequence.
        semantic_target_dim (`int`, *optional*):
            Width of the features that the semantic decoder gives back; the semantic encoder's by default.
        sides (`list[int]`, *optional*): Side lengths of the square scale schedule, in grid cells.
        levels (`list[int]`, *optional*): Numbers of scales that make a complete picture.
        final_grids (`list[list[int]]`, *optional*): Aspect-ratio buckets at the highest level, as (height, width).
        prefix_scales (`list[int]`, *optional*):
            Numbers of first scales of a square picture that the pixel decoder was trained to show in a size of their
            own. By none by default.
        scale_dropout (`float`, *optional*, defaults to 0.5):
            Probability of leaving out a scale (never the first) in a training step.
        commitment_weight (`float`, *optional*, defaults to 0.25): Weight of the commitment term.
        semantic_weight (`float`, *optional*, defaults to 1.0): Weight of the semantic reconstruction loss.
        dead_code_threshold (`float`, *optional*, defaults to 0.02):
            A code used less than this fraction of its fair share is moved onto a current encoder output in training.
            0 turns this off.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of linear weights at the start.
    """

    model_type = "nextflow_vq"
    base_config_key = "vq_config"
    sub_configs = {"vision_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    semantic_layer: int = -2
    codebook_size: int = 32768
    semantic_dim: int = 32
    pixel_dim: int = 8
    pixel_distance_weight: float = 1.0
    num_channels: int = 3
    latent_channels: int = 256
    encoder_channels: list[int] = field(default_factory=lambda: [128, 128, 256, 256, 512])
    encoder_layers: int = 2
    decoder_channels: list[int] = field(default_factory=lambda: [128, 128, 256, 256, 512])
    decoder_layers: int = 2
    norm_num_groups: int = 32
    pixel_attention: bool = True
    semantic_decoder_layers: int = 3
    semantic_decoder_config: dict | None = None
    semantic_decoder_class_token: bool = False
    semantic_target_dim: int | None = None
    sides: list[int] = field(default_factory=lambda: list(NEXTFLOW_SIDES))
    levels: list[int] = field(default_factory=lambda: list(NEXTFLOW_LEVELS))
    final_grids: list[list[int]] = field(default_factory=lambda: [list(grid) for grid in NEXTFLOW_FINAL_GRIDS])
    prefix_scales: list[int] = field(default_factory=list)
    scale_dropout: float = 0.5
    commitment_weight: float = 0.25
    semantic_weight: float = 1.0
    dead_code_threshold: float = 0.02
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = Siglip2VisionConfig(
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=27,
                num_attention_heads=16,
                patch_size=16,
                num_patches=256,
                vision_use_head=False,
            )
        elif isinstance(self.vision_config, dict):
            kind = self.vision_config.get("model_type", Siglip2VisionConfig.model_type)
            if kind not in VISION_CONFIGS:
                raise ValueError(f"A semantic encoder is one of {sorted(VISION_CONFIGS)}, got {kind!r}.")
            self.vision_config = VISION_CONFIGS[kind](**self.vision_config)
        super().__post_init__(**kwargs)
        if len(self.encoder_channels) != len(self.decoder_channels):
            raise ValueError(
                "`encoder_channels` and `decoder_channels` need the same number of levels, got "
                f"{self.encoder_channels} and {self.decoder_channels}."
            )
        vision = self.vision_config
        if self.image_size is None and vision.patch_size != self.downsample:
            raise ValueError(
                f"{len(self.encoder_channels)} CNN levels downsample by {self.downsample}, but the semantic encoder's "
                f"patches are {vision.patch_size} pixels wide; the two must agree."
            )
        if self.image_size is not None and vision.image_size // vision.patch_size != self.sides[-1]:
            raise ValueError(
                f"The semantic encoder sees {vision.image_size // vision.patch_size} patches a side, but the schedule "
                f"ends with {self.sides[-1]}; the two must agree."
            )
        if not all(0 < own < len(self.sides) for own in self.prefix_scales):
            raise ValueError(
                f"`prefix_scales` are numbers of the first of {len(self.sides)} scales, got {self.prefix_scales}."
            )
        self.schedule  # an invalid schedule is an error here, not at the first picture  # noqa: B018

    @property
    def downsample(self) -> int:
        """Pixels per grid cell and side of what the CNNs see."""
        return 2 ** (len(self.encoder_channels) - 1)

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the only pictures that the semantic encoder takes; `None` where it takes any size."""
        takes_any = self.vision_config.model_type == Siglip2VisionConfig.model_type
        return None if takes_any else self.vision_config.image_size

    @property
    def code_dim(self) -> int:
        """Width of a code: semantic and pixel parts together."""
        return self.semantic_dim + self.pixel_dim

    @property
    def schedule(self) -> ScaleSchedule:
        """The scale schedule that these numbers describe."""
        return ScaleSchedule(
            tuple(self.sides), tuple(self.levels), tuple(tuple(grid) for grid in self.final_grids), self.downsample
        )


@strict
class NextFlowConfig(PreTrainedConfig):
    r"""
    Configuration of [`NextFlowModel`] and [`NextFlowForConditionalGeneration`].

    Args:
        text_config (`dict` or `Qwen2_5_VLTextConfig`, *optional*):
            The decoder: Qwen2.5-VL's text model. `vocab_size` counts text tokens and image codes together.
        vq_config (`dict` or `NextFlowVQConfig`, *optional*): The image tokenizer.
        code_start_id (`int`, *optional*, defaults to 152064):
            Vocabulary id of code 0; the codes are the last `codebook_size` entries of the vocabulary.
        boi_token_id (`int`, *optional*, defaults to 151652): Begin-of-image token, the slot of the 1x1 scale.
        eoi_token_id (`int`, *optional*, defaults to 151653): End-of-image token.
        image_token_id (`int`, *optional*, defaults to 151655): Placeholder at the slots of the scales 2..K.
        position_range (`float`, *optional*, defaults to 64.0):
            C of the multi-scale rotary position (NextFlow Eq 1): all scales share spatial positions in [0, C].
            The paper states neither its value nor how coordinates map onto a head's frequencies. Mind the two
            together: Qwen2.5-VL's sections give columns the lowest frequencies, so at C = 64 and theta = 1e6 the
            columns of a picture differ by 0.011 rad at most, and rows by 2 rad. Mini takes theta = 100, where they
            differ by 3.6 and 20 rad; with columns 0.05 rad apart it took 1.6 times the steps to the same loss.
        visual_input (`str`, *optional*, defaults to `"residual"`):
            What a block of slots is fed: the previous scale's own codes (`"residual"`, NextFlow), or the running sum
            of all earlier scales (`"accumulated"`, TokenFlow and VAR).
        context_image (`str`, *optional*, defaults to `"scales"`):
            What an image that something follows shows to it: its coarse scales as in drawing (`"scales"`); these and
            one more block with the sum of all scales (`"scales+final"`); or that last block alone for an image that
            is given, and after the scales of one that was drawn (`"final"`; 28 % of the positions of its scales for the
            7B at 256 px, 50 % for mini at 64).
        scale_loss_alpha (`float`, *optional*, defaults to 0.0):
            Exponent of the scale weights 1 / (h * w)^alpha in the image loss (NextFlow Eq 2); 0.9 from 512 px on.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Whether the head shares the embedding table.
        abilities (`list[str]`, *optional*):
            What the checkpoint was trained for, of "text", "image", "caption", "edit", "interleaved". Calls that need
            another ability are refused. `None` means not recorded: nothing is refused.
        trained_image_sizes (`list[list[int]]`, *optional*):
            (height, width) in pixels of the pictures that the checkpoint was trained to draw. Other sizes are refused.
            `None` means not recorded.
        codebook_fingerprint (`str`, *optional*):
            Hash of the codebook that the decoder was trained with; another tokenizer is refused.
        auto_map (`dict`, *optional*):
            Which class of the checkpoint's own code serves which Auto class where this package is not installed.
    """

    model_type = "nextflow"
    sub_configs = {"text_config": AutoConfig, "vq_config": NextFlowVQConfig}
    keys_to_ignore_at_inference = ["past_key_values", "text_loss", "image_loss", "image_loss_per_scale"]

    text_config: dict | PreTrainedConfig | None = None
    vq_config: dict | PreTrainedConfig | None = None
    code_start_id: int = 152064
    boi_token_id: int = 151652
    eoi_token_id: int = 151653
    image_token_id: int = 151655
    position_range: float = 64.0
    visual_input: str = "residual"
    context_image: str = "scales"
    scale_loss_alpha: float = 0.0
    tie_word_embeddings: bool = False
    abilities: list[str] | None = None
    trained_image_sizes: list[list[int]] | None = None
    codebook_fingerprint: str | None = None
    auto_map: dict = field(default_factory=lambda: dict(_AUTO_MAP))

    def __post_init__(self, **kwargs):
        if self.vq_config is None:
            self.vq_config = NextFlowVQConfig()
        elif isinstance(self.vq_config, dict):
            self.vq_config = NextFlowVQConfig(**self.vq_config)
        if self.text_config is None:
            self.text_config = _qwen2_5_7b_text_config(self.code_start_id + self.vq_config.codebook_size)
        elif isinstance(self.text_config, dict):
            self.text_config = Qwen2_5_VLTextConfig(
                **{key: value for key, value in self.text_config.items() if key != "model_type"}
            )
        super().__post_init__(**kwargs)
        needed = self.code_start_id + self.vq_config.codebook_size
        if self.text_config.vocab_size < needed:
            raise ValueError(
                f"A vocabulary of {self.text_config.vocab_size} has no room for {self.vq_config.codebook_size} codes "
                f"from {self.code_start_id} on; it needs {needed} entries."
            )
        if self.visual_input not in ("residual", "accumulated"):
            raise ValueError(f'`visual_input` must be "residual" or "accumulated", got "{self.visual_input}".')
        if self.context_image not in CONTEXT_IMAGES:
            raise ValueError(f'`context_image` must be one of {CONTEXT_IMAGES}, got "{self.context_image}".')
        if self.context_image == "final":
            self._check_final_blocks()
        unknown = set(self.abilities or ()) - set(ABILITIES)
        if unknown:
            raise ValueError(f"`abilities` must be of {ABILITIES}, got {sorted(unknown)}.")

    def _check_final_blocks(self) -> None:
        """Placeholders must tell a picture's final block alone from its first scales."""
        for level in self.schedule.levels:
            for final_grid in self.schedule.buckets(level):
                grids = self.schedule.grids(final_grid, level)
                if read_blocks(final_grid[0] * final_grid[1], grids) != (1, True):
                    raise ValueError(
                        f'`context_image="final"` does not go with the scales {list(grids)}: as many slots as the '
                        "final block has could be the first of them."
                    )

    @property
    def schedule(self) -> ScaleSchedule:
        """The tokenizer's scale schedule."""
        return self.vq_config.schedule

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "NextFlowConfig":
        """Configuration of a named shape: `"nextflow-7b"` or `"nextflow-mini"`.

        With a tokenizer of another size (`vq_config`), the vocabulary has as many codes as that has.

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in _PRESETS:
            raise ValueError(f"There is no preset {name!r}; the presets are {sorted(_PRESETS)}.")
        entries = {**_PRESETS[name](), **overrides}
        if "text_config" in entries and "text_config" not in overrides and "vq_config" in overrides:
            vq_config = overrides["vq_config"] or {}
            if isinstance(vq_config, dict):
                vq_config = NextFlowVQConfig(**vq_config)
            entries["text_config"].vocab_size = entries["code_start_id"] + vq_config.codebook_size
        return cls(**entries)


def _qwen2_5_7b_text_config(vocab_size: int) -> Qwen2_5_VLTextConfig:
    return Qwen2_5_VLTextConfig(
        vocab_size=vocab_size,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=128000,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )


def _nextflow_7b() -> dict:
    return {}


# The mini tokenizer keeps Qwen's names for its special tokens; see processing/tokenization_nextflow.py for their ids.
MINI_TEXT_VOCAB_SIZE = 768
MINI_SPECIAL_TOKEN_IDS = {
    "<|endoftext|>": 0,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|vision_start|>": 3,
    "<|vision_end|>": 4,
    "<|image_pad|>": 5,
}


def _nextflow_mini() -> dict:
    vq_config = NextFlowVQConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "patch_size": 8,
            "num_patches": 64,
            "vision_use_head": False,
        },
        codebook_size=512,
        latent_channels=64,
        encoder_channels=[16, 32, 64, 64],
        encoder_layers=1,
        decoder_channels=[16, 32, 64, 96],
        decoder_layers=1,
        norm_num_groups=8,
        semantic_decoder_layers=2,
        sides=list(MINI_SIDES),
        levels=list(MINI_LEVELS),
        final_grids=[list(grid) for grid in MINI_FINAL_GRIDS],
        scale_dropout=0.1,
    )
    text_config = Qwen2_5_VLTextConfig(
        vocab_size=MINI_TEXT_VOCAB_SIZE + vq_config.codebook_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        # Qwen's sections give columns the lowest frequencies of a head. A small theta and a wide range C keep the
        # columns of a grid apart: at theta 1e4 and C = 16 they would differ by 0.05 rad in all.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 12, 12]},
        bos_token_id=MINI_SPECIAL_TOKEN_IDS["<|endoftext|>"],
        eos_token_id=MINI_SPECIAL_TOKEN_IDS["<|im_end|>"],
        pad_token_id=MINI_SPECIAL_TOKEN_IDS["<|endoftext|>"],
    )
    return {
        "vq_config": vq_config,
        "text_config": text_config,
        "code_start_id": MINI_TEXT_VOCAB_SIZE,
        "boi_token_id": MINI_SPECIAL_TOKEN_IDS["<|vision_start|>"],
        "eoi_token_id": MINI_SPECIAL_TOKEN_IDS["<|vision_end|>"],
        "image_token_id": MINI_SPECIAL_TOKEN_IDS["<|image_pad|>"],
        "position_range": 64.0,
        "tie_word_embeddings": True,
        "scale_loss_alpha": 0.9,
    }


_PRESETS = {"nextflow-7b": _nextflow_7b, "nextflow-mini": _nextflow_mini}
