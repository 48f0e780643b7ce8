"""A Qwen2.5-VL of a few thousand parameters, as it is published."""

from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from nextflow_hf.processing.tokenization_nextflow import train_tokenizer


def tiny_qwen(folder: Path, tied: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with every part, in several shards, with its tokenizer."""
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    config.text_config.tie_word_embeddings = tied
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(folder, max_shard_size="40KB")
    train_tokenizer(["a red circle", "a blue square"], 290).save_pretrained(folder)
    return model
