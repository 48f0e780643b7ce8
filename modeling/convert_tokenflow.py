"""TokenFlow's published weights (arXiv 2412.03069) as ours: its image tokenizers and its text-to-image model.

Configurations are read off the shapes; what shapes do not tell (heads, the picture's size, the list of scales) stands
in [`TOKENIZERS`]. Names and formulas are those of the public reference implementation of 2025-08-08.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, SiglipVisionConfig

from .configuration_nextflow import NextFlowVQConfig
from .configuration_tokenflow import TokenFlowConfig
from .weight_conversion import Dropped, Rule, Shapes, rename, rename_module

# Written by the reference's training as a log of which codes were chosen.
TOKENIZER_DROPPED = (
    Dropped("quantize.codebook_used", "a log of training"),
    Dropped("scaling_layer.", "constants, which the SigLIP encoder applies"),
)
T2I_DROPPED = (
    Dropped("image_token_start", "looked up in the text tokenizer"),
    Dropped("image_token_end", "looked up in the text tokenizer"),
    Dropped("model.image_token_start", "looked up in the text tokenizer"),
    Dropped("model.image_token_end", "looked up in the text tokenizer"),
)
_CODE_EMBEDDINGS = ("quantize.embedding_vqkd.weight", "quantize.embedding_vqgan.weight")


@dataclass(frozen=True)
class TokenFlowTokenizer:
    """What the shapes of a tokenizer's weights do not tell.

    Attributes:
        kind: `"clip"` or `"siglip"`, its semantic encoder.
        image_size: Side of its square pictures in pixels.
        sides: Its scales.
        heads: Attention heads of the semantic encoder.
        decoder_heads: Attention heads of the semantic decoder.
        files: The published files.
    """

    kind: str
    image_size: int
    sides: tuple[int, ...]
    heads: int
    decoder_heads: int
    files: tuple[str, ...] = ()


TOKENIZERS = {
    "clipb_224": TokenFlowTokenizer("clip", 224, (1, 2, 4, 6, 8, 10, 12, 14), 12, 12),
    "clipb_256": TokenFlowTokenizer(
        "clip", 256, (1, 2, 4, 6, 8, 10, 12, 14, 16), 12, 12, ("tokenflow_clipb_32k_enhanced.pt",)
    ),
    "siglip_384": TokenFlowTokenizer(
        "siglip", 384, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27), 16, 12, ("tokenflow_siglip_32k.pt",)
    ),
}


def tokenizer_variant(shapes: Shapes) -> str:
    """Which of [`TOKENIZERS`] a file of weights is; CLIP ones are taken for the published 256-pixel one.

    Raises:
        ValueError: If it is none of them.
    """
    if "encoder_vqkd.class_embedding" in shapes:
        return "clipb_256"
    if any(name.startswith("encoder_vqkd.vision_model.") for name in shapes):
        return "siglip_384"
    if any(name.startswith("encoder_vqkd.patch_embed.backbone.") for name in shapes):
        raise ValueError(
            "These are the weights of TokenFlow-L, whose semantic encoder is a ViTamin. It is not supported: no file "
            "of it was published, and its encoder exists in timm alone. TokenFlow-B, -XL and the text-to-image "
            f"tokenizer ({sorted(TOKENIZERS)}) are."
        )
    raise ValueError(
        "These are not the weights of a TokenFlow tokenizer: there is neither `encoder_vqkd.class_embedding` (CLIP) "
        f"nor `encoder_vqkd.vision_model.*` (SigLIP) among {len(shapes)} names such as {sorted(shapes)[:5]}."
    )


def tokenizer_config(shapes: Shapes, variant: TokenFlowTokenizer) -> NextFlowVQConfig:
    """The configuration of a tokenizer with weights of these shapes.

    Raises:
        ValueError: If a weight that tells it is missing.
    """
    try:
        return _tokenizer_config(shapes, variant)
    except KeyError as error:
        raise ValueError(f"The weights do not fit. The weight {error} is missing.") from error


def _tokenizer_config(shapes: Shapes, variant: TokenFlowTokenizer) -> NextFlowVQConfig:
    width = shapes["encode_task_layer.0.weight"][0]
    if variant.kind == "clip":
        patch = shapes["encoder_vqkd.conv1.weight"][-1]
        layers = _count(shapes, "encoder_vqkd.transformer.resblocks.")
        vision_config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=shapes["encoder_vqkd.transformer.resblocks.0.mlp.c_fc.weight"][0],
            num_hidden_layers=layers,
            num_attention_heads=variant.heads,
            patch_size=patch,
            image_size=variant.image_size,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        )
    else:
        prefix = "encoder_vqkd.vision_model."
        patch = shapes[f"{prefix}embeddings.patch_embedding.weight"][-1]
        vision_config = SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
            # The tokenizer reads the output of the last layer but one.
            num_hidden_layers=_count(shapes, f"{prefix}encoder.layers.") - 1,
            num_attention_heads=variant.heads,
            patch_size=patch,
            image_size=variant.image_size,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            vision_use_head=False,
        )
    levels = _count(shapes, "encoder.conv_blocks.")
    return NextFlowVQConfig(
        vision_config=vision_config,
        semantic_layer=-1,
        codebook_size=shapes[_CODE_EMBEDDINGS[0]][0],
        semantic_dim=shapes[_CODE_EMBEDDINGS[0]][1],
        pixel_dim=shapes[_CODE_EMBEDDINGS[1]][1],
        latent_channels=shapes["quant_conv.weight"][1],
        encoder_channels=[shapes[f"encoder.conv_blocks.{own}.res.0.conv1.weight"][0] for own in range(levels)],
        encoder_layers=_count(shapes, "encoder.conv_blocks.0.res."),
        decoder_channels=[
            shapes[f"decoder.conv_blocks.{own}.res.0.conv1.weight"][0] for own in reversed(range(levels))
        ],
        decoder_layers=_count(shapes, "decoder.conv_blocks.0.res.") - 1,
        semantic_decoder_layers=_count(shapes, "decoder_vqkd.blocks."),
        semantic_decoder_config={
            "num_attention_heads": variant.decoder_heads,
            "intermediate_size": shapes["decoder_vqkd.blocks.0.mlp.fc1.weight"][0],
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
        semantic_decoder_class_token=True,
        semantic_target_dim=shapes["decode_task_layer.2.weight"][0],
        sides=list(variant.sides),
        levels=[len(variant.sides)],
        final_grids=[[variant.sides[-1]] * 2],
        scale_dropout=0.1,
    )


def tokenizer_rules(config: NextFlowVQConfig) -> tuple[list[Rule], tuple[Dropped, ...]]:
    """How a TokenFlow tokenizer becomes a [`NextFlowVQModel`] of this configuration, and what is left out."""
    side = config.sides[-1]
    rules = [
        *rename_module("quant_conv", "pixel_proj"),
        *rename_module("post_quant_conv", "post_pixel_proj"),
        rename(_CODE_EMBEDDINGS[0], "codebook.semantic.weight"),
        rename(_CODE_EMBEDDINGS[1], "codebook.pixel.weight"),
        Rule((), ("codebook.usage",), lambda: torch.ones(config.codebook_size)),
        *_cnn_rules("encoder", config),
        *_cnn_rules("decoder", config),
    ]
    for layer in (0, 2):
        rules += rename_module(f"encode_task_layer.{layer}", f"semantic_proj.{layer}")
        rules += rename_module(f"decode_task_layer.{layer}", f"semantic_decoder.head.{layer}")
    rules += [
        Rule(
            ("decoder_vqkd.cls_token", "decoder_vqkd.pos_embed"),
            ("semantic_decoder.class_token", "semantic_decoder.position_embedding.weight"),
            lambda token, table: (token + table[:, :1], _resize_positions(table[0, 1:], side)),
        ),
        Rule(
            ("decoder_vqkd.patch_embed.proj.weight",),
            ("semantic_decoder.in_proj.weight",),
            lambda weight: weight[:, :, 0, 0],
        ),
        rename("decoder_vqkd.patch_embed.proj.bias", "semantic_decoder.in_proj.bias"),
        *rename_module("decoder_vqkd.fc_norm", "semantic_decoder.norm"),
    ]
    for layer in range(config.semantic_decoder_layers):
        rules += _semantic_decoder_layer(f"decoder_vqkd.blocks.{layer}", f"semantic_decoder.encoder.layers.{layer}")
    if config.vision_config.model_type == CLIPVisionConfig.model_type:
        rules += _clip_rules(config.vision_config.num_hidden_layers, side)
        return rules, TOKENIZER_DROPPED
    layers, prefix = config.vision_config.num_hidden_layers, "encoder_vqkd.vision_model."
    rules += _siglip_rules(prefix, layers)
    unused = "the tokenizer reads the layer before"
    return rules, (
        *TOKENIZER_DROPPED,
        Dropped(f"{prefix}encoder.layers.{layers}.", unused),
        Dropped(f"{prefix}head.", unused),
    )


def t2i_config(shapes: Shapes, source: Mapping, vq_config: NextFlowVQConfig, **token_ids) -> TokenFlowConfig:
    """The configuration of a text-to-image model with weights of these shapes.

    Args:
        shapes: Names and shapes of its weights.
        source: Its own `config.json`, for what shapes do not tell.
        vq_config: The tokenizer that goes with it.
        token_ids: `code_start_id`, `image_start_ids`, `pad_token_id`, ... of [`TokenFlowConfig`].

    Raises:
        ValueError: If something is missing in the source's configuration or weights.
    """
    missing = [name for name in ("num_attention_heads", "rms_norm_eps") if name not in source]
    needed = ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight", "model.mm_projector.0.weight")
    missing += [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(f"This is no TokenFlow text-to-image model: {missing} are missing.")
    vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
    rope = source.get("rope_parameters") or {}
    if source.get("rope_scaling"):
        raise ValueError("This model's configuration scales its rotary positions, which TokenFlow's does not.")
    return TokenFlowConfig(
        vq_config=vq_config,
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
            "num_hidden_layers": _count(shapes, "model.layers."),
            "num_attention_heads": source["num_attention_heads"],
            "num_key_value_heads": source.get("num_key_value_heads", source["num_attention_heads"]),
            "head_dim": hidden_size // source["num_attention_heads"],
            "rms_norm_eps": source["rms_norm_eps"],
            "hidden_act": source.get("hidden_act", "silu"),
            "max_position_embeddings": source.get("max_position_embeddings", 2048),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": rope.get("rope_theta", source.get("rope_theta", 10000.0)),
            },
        },
        **token_ids,
    )


def t2i_rules(config: TokenFlowConfig) -> tuple[list[Rule], tuple[Dropped, ...]]:
    """How TokenFlow's text-to-image model becomes a [`TokenFlowForImageGeneration`], but for its tokenizer, which its
    checkpoint does not hold."""
    rules = [
        rename("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        rename("model.norm.weight", "model.language_model.norm.weight"),
        rename("lm_head.weight", "lm_head.weight"),
        rename("model.lvl_embed.weight", "model.level_embedding.weight"),
        rename("model.pos_1LC", "model.position_embedding.weight"),
        *rename_module("model.mm_projector.0", "model.connector.linear_1"),
        *rename_module("model.mm_projector.2", "model.connector.linear_2"),
    ]
    names = {
        **{f"self_attn.{own}_proj": f"self_attn.{own}_proj" for own in "qkvo"},
        "self_attn.qknorm.query_norm": "self_attn.q_norm",
        "self_attn.qknorm.key_norm": "self_attn.k_norm",
        **{f"mlp.{own}_proj": f"mlp.{own}_proj" for own in ("gate", "up", "down")},
        "input_layernorm": "post_attention_layernorm",
        "post_attention_layernorm": "post_feedforward_layernorm",
    }
    for layer in range(config.text_config.num_hidden_layers):
        rules += [
            rename(f"model.layers.{layer}.{source}.weight", f"model.language_model.layers.{layer}.{target}.weight")
            for source, target in names.items()
        ]
    return rules, T2I_DROPPED


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules stand under a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _resize_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """Positions `(g * g, width)` for a grid of `side`, as TokenFlow stretches them: by (side + 0.1) / g, whose exact
    value matters (it avoids a rounding in DINO's code), bicubic, without antialiasing."""
    own = int(len(table) ** 0.5)
    if own * own != len(table):
        raise ValueError(f"{len(table)} positions are not a square grid.")
    if own == side:
        return table
    grid = table.float().unflatten(0, (own, own)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / own, mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T.to(table.dtype)


def _cnn_rules(part: str, config: NextFlowVQConfig) -> list[Rule]:
    """The pixel encoder or decoder: a VQGAN's CNN in TokenFlow's names to the same in diffusers'."""
    own, levels = f"pixel_{part}", len(config.encoder_channels)
    if part == "encoder":
        blocks, sampler = "down_blocks", ("downsample", "downsamplers.0")
        widths, layers, attending = config.encoder_channels, config.encoder_layers, levels - 1
    else:
        blocks, sampler = "up_blocks", ("upsample", "upsamplers.0")
        widths, layers, attending = config.decoder_channels[::-1], config.decoder_layers + 1, 0
    rules = [
        *rename_module(f"{part}.conv_in", f"{own}.conv_in"),
        *_resnet(f"{part}.mid.0", f"{own}.mid_block.resnets.0", shortcut=False),
        *_attention(f"{part}.mid.1", f"{own}.mid_block.attentions.0"),
        *_resnet(f"{part}.mid.2", f"{own}.mid_block.resnets.1", shortcut=False),
        *rename_module(f"{part}.norm_out", f"{own}.conv_norm_out"),
        *rename_module(f"{part}.conv_out", f"{own}.conv_out"),
    ]
    for level, (before, width) in enumerate(zip((widths[0], *widths), widths)):
        source, target = f"{part}.conv_blocks.{level}", f"{own}.{blocks}.{level}"
        for layer in range(layers):
            shortcut = layer == 0 and before != width
            rules += _resnet(f"{source}.res.{layer}", f"{target}.resnets.{layer}", shortcut)
            if level == attending:
                rules += _attention(f"{source}.attn.{layer}", f"{target}.attentions.{layer}")
        if level < levels - 1:
            rules += rename_module(f"{source}.{sampler[0]}.conv", f"{target}.{sampler[1]}.conv")
    return rules


def _resnet(source: str, target: str, shortcut: bool) -> list[Rule]:
    rules = [rule for name in ("norm1", "conv1", "norm2", "conv2") for rule in _same(source, target, name)]
    return rules + (rename_module(f"{source}.nin_shortcut", f"{target}.conv_shortcut") if shortcut else [])


def _same(source: str, target: str, name: str) -> list[Rule]:
    return rename_module(f"{source}.{name}", f"{target}.{name}")


def _attention(source: str, target: str) -> list[Rule]:
    """Attention by 1x1 convolutions to attention by linear layers."""
    rules = rename_module(f"{source}.norm", f"{target}.group_norm")
    for name, own in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        rules.append(Rule((f"{source}.{name}.weight",), (f"{target}.{own}.weight",), lambda weight: weight[:, :, 0, 0]))
        rules.append(rename(f"{source}.{name}.bias", f"{target}.{own}.bias"))
    return rules


def _semantic_decoder_layer(source: str, target: str) -> list[Rule]:
    """A BEiT layer, whose keys have no bias, to a SigLIP2 layer."""
    projections = [f"{target}.self_attn.{own}_proj" for own in "qkv"]
    return [
        *rename_module(f"{source}.norm1", f"{target}.layer_norm1"),
        *rename_module(f"{source}.norm2", f"{target}.layer_norm2"),
        Rule(
            (f"{source}.attn.qkv.weight",),
            tuple(f"{own}.weight" for own in projections),
            lambda weight: weight.chunk(3),
        ),
        Rule(
            (f"{source}.attn.q_bias", f"{source}.attn.v_bias"),
            tuple(f"{own}.bias" for own in projections),
            lambda query, value: (query, torch.zeros_like(query), value),
        ),
        *rename_module(f"{source}.attn.proj", f"{target}.self_attn.out_proj"),
        *rename_module(f"{source}.mlp.fc1", f"{target}.mlp.fc1"),
        *rename_module(f"{source}.mlp.fc2", f"{target}.mlp.fc2"),
    ]


def _clip_rules(layers: int, side: int) -> list[Rule]:
    """OpenAI's CLIP to transformers'."""
    source, target = "encoder_vqkd", "semantic_encoder"
    rules = [
        rename(f"{source}.class_embedding", f"{target}.embeddings.class_embedding"),
        rename(f"{source}.conv1.weight", f"{target}.embeddings.patch_embedding.weight"),
        Rule(
            (f"{source}.positional_embedding",),
            (f"{target}.embeddings.position_embedding.weight",),
            lambda table: torch.cat([table[:1], _resize_positions(table[1:], side)]),
        ),
        *rename_module(f"{source}.ln_pre", f"{target}.pre_layrnorm"),
        *rename_module(f"{source}.ln_post", f"{target}.post_layernorm"),
    ]
    for layer in range(layers):
        own, ours = f"{source}.transformer.resblocks.{layer}", f"{target}.encoder.layers.{layer}"
        rules += [
            Rule(
                (f"{own}.attn.in_proj_{kind}",),
                tuple(f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv"),
                lambda tensor: tensor.chunk(3),
            )
            for kind in ("weight", "bias")
        ]
        names: Sequence[tuple[str, str]] = (
            ("ln_1", "layer_norm1"),
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        )
        for name, name_here in names:
            rules += rename_module(f"{own}.{name}", f"{ours}.{name_here}")
    return rules


def _siglip_rules(prefix: str, layers: int) -> list[Rule]:
    """transformers' SigLIP with the level of names that later versions dropped."""
    target = "semantic_encoder"
    rules = [
        *rename_module(f"{prefix}embeddings.patch_embedding", f"{target}.embeddings.patch_embedding"),
        rename(f"{prefix}embeddings.position_embedding.weight", f"{target}.embeddings.position_embedding.weight"),
        *rename_module(f"{prefix}post_layernorm", f"{target}.post_layernorm"),
    ]
    for layer in range(layers):
        for name in (
            "layer_norm1",
            *(f"self_attn.{own}_proj" for own in ("q", "k", "v", "out")),
            "layer_norm2",
            "mlp.fc1",
            "mlp.fc2",
        ):
            rules += _same(f"{prefix}encoder.layers.{layer}", f"{target}.encoder.layers.{layer}", name)
    return rules
