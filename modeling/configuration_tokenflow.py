"""Configuration of TokenFlow's text-to-image model."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen3Config

from .configuration_nextflow import NextFlowVQConfig
from .scale_schedule import ScaleSchedule


@strict
class TokenFlowConfig(PreTrainedConfig):
    r"""
    Configuration of [`TokenFlowForImageGeneration`], TokenFlow's text-to-image model (arXiv 2412.03069).

    Args:
        vq_config (`dict` or `NextFlowVQConfig`, *optional*): The image tokenizer.
        text_config (`dict` or `Qwen3Config`, *optional*):
            The decoder. Its attention is Qwen3's, which normalises queries and keys per head; the other norms stand
            elsewhere than Qwen3's.
        code_start_id (`int`, *optional*, defaults to 32001): Id of code 0 in the vocabulary.
        image_start_ids (`list[int]`, *optional*):
            Ids of the text that opens a picture, `<img>`. It is plain text of several tokens.
        prompt_length (`int`, *optional*, defaults to 128):
            Tokens of a prompt, padding on its left included: all prompts are equally long, and padding takes up
            positions.
        qk_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of the norms of queries and keys.
        trained_image_sizes (`list[list[int]]`, *optional*): Its picture sizes as (height, width).
        abilities (`list[str]`, *optional*): What it was trained for.
        codebook_fingerprint (`str`, *optional*): Identity of the tokenizer that it was trained with.
    """

    model_type = "tokenflow"
    sub_configs = {"vq_config": NextFlowVQConfig, "text_config": Qwen3Config}
    visual_input = "accumulated"

    vq_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    code_start_id: int = 32001
    image_start_ids: list[int] = field(default_factory=lambda: [529, 2492, 29958])
    prompt_length: int = 128
    qk_norm_eps: float = 1e-6
    trained_image_sizes: list[list[int]] | None = None
    abilities: list[str] | None = field(default_factory=lambda: ["image"])
    codebook_fingerprint: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.vq_config is None:
            self.vq_config = _t2i_tokenizer()
        elif isinstance(self.vq_config, dict):
            self.vq_config = NextFlowVQConfig(**self.vq_config)
        if self.text_config is None:
            self.text_config = _llama_2_7b(self.code_start_id + self.vq_config.codebook_size)
        elif isinstance(self.text_config, dict):
            self.text_config = Qwen3Config(
                **{key: value for key, value in self.text_config.items() if key != "model_type"}
            )
        super().__post_init__(**kwargs)
        if self.trained_image_sizes is None:
            self.trained_image_sizes = [list(self.schedule.image_size((self.schedule.sides[-1],) * 2))]
        if self.code_start_id + self.vq_config.codebook_size > self.text_config.vocab_size:
            raise ValueError(
                f"Codes {self.code_start_id}..{self.code_start_id + self.vq_config.codebook_size - 1} do not fit a "
                f"vocabulary of {self.text_config.vocab_size}."
            )
        if not self.image_start_ids or self.prompt_length < 1:
            raise ValueError(
                f"A prompt needs tokens and an opening, got `prompt_length` {self.prompt_length} and "
                f"`image_start_ids` {self.image_start_ids}."
            )

    @property
    def schedule(self) -> ScaleSchedule:
        """The tokenizer's scale schedule."""
        return self.vq_config.schedule

    @property
    def num_codes(self) -> int:
        """Codes of a picture."""
        return sum(side * side for side in self.schedule.sides)


def _t2i_tokenizer() -> NextFlowVQConfig:
    """TokenFlow's tokenizer of 256-pixel pictures: CLIP-B and the enhanced pixel decoder."""
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
        "image_size": 256,
    }
    return NextFlowVQConfig(
        vision_config=vision_config,
        semantic_layer=-1,
        decoder_channels=[256, 256, 512, 512, 1024],
        decoder_layers=4,
        semantic_decoder_config={"hidden_act": "gelu", "layer_norm_eps": 1e-6},
        semantic_decoder_class_token=True,
        semantic_target_dim=512,
        sides=[1, 2, 4, 6, 8, 10, 12, 14, 16],
        levels=[9],
        final_grids=[[16, 16]],
        scale_dropout=0.1,
    )


def _llama_2_7b(vocab_size: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=32000,
    )


__all__ = ["TokenFlowConfig"]
