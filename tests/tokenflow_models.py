"""TokenFlow's models in the sizes of the golden files, and their weights under the reference's names."""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from nextflow_hf.modeling.convert_tokenflow import TOKENIZERS, t2i_config, t2i_rules, tokenizer_config, tokenizer_rules
from nextflow_hf.modeling.modeling_nextflow_vq import NextFlowVQModel
from nextflow_hf.modeling.modeling_tokenflow import TokenFlowForImageGeneration
from nextflow_hf.modeling.weight_conversion import apply_rules

GOLDEN = Path(__file__).parent / "modeling" / "golden"
# What the reference's tiny model was made with; its own rules would give one head for every 64 channels.
TINY_TOKENIZER = replace(TOKENIZERS["clipb_256"], heads=4, decoder_heads=4)
TINY_LM = {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
TINY_TOKENS = {"code_start_id": 65, "image_start_ids": [60, 61, 62], "prompt_length": 12}
TINY_PAD = 64


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A golden file: weights under the reference's names, and what the reference made with them."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key.removeprefix("model."): own for key, own in tensors.items() if key.startswith("model.")}
    return weights, {key: own for key, own in tensors.items() if not key.startswith("model.")}


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(own.shape) for name, own in weights.items()}


def variant_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the published tokenizers' weights."""
    variants = json.loads((GOLDEN / "tokenflow_state_dict_shapes.json").read_text())
    return {name: {key: tuple(own) for key, own in shapes.items()} for name, shapes in variants.items()}


def weight_by_rule(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight of the full-size golden file, which holds none."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) < 2:
        return 0.02 * tensor + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return tensor if name.startswith("quantize.embedding") else tensor / math.sqrt(math.prod(shape[1:]))


def tiny_tokenizer() -> NextFlowVQModel:
    weights, _ = golden("tokenflow_tokenizer")
    config = tokenizer_config(shapes_of(weights), TINY_TOKENIZER)
    model = NextFlowVQModel(config).eval()
    model.load_state_dict(dict(apply_rules(tokenizer_rules(config)[0], weights.__getitem__)))
    return model


def tiny_t2i() -> TokenFlowForImageGeneration:
    weights, _ = golden("tokenflow_t2i")
    vq_model = tiny_tokenizer()
    config = t2i_config(shapes_of(weights), TINY_LM, vq_model.config, **TINY_TOKENS)
    config.text_config.pad_token_id, config.text_config.bos_token_id = TINY_PAD, 1
    model = TokenFlowForImageGeneration(config).eval()
    own = dict(apply_rules(t2i_rules(config)[0], weights.__getitem__))
    model.load_state_dict(own | {f"model.vq_model.{name}": tensor for name, tensor in vq_model.state_dict().items()})
    return model
