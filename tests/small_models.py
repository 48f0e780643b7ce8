"""Models of a few thousand parameters with every part of the real ones."""

from pathlib import Path

import torch
from transformers import GenerationConfig

from nextflow_hf.modeling.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.processing.image_processing_base_nextflow import buckets_from_schedule
from nextflow_hf.processing.image_processing_pil_nextflow import NextFlowImageProcessorPil
from nextflow_hf.processing.processing_nextflow import NextFlowProcessor
from nextflow_hf.processing.tokenization_nextflow import train_tokenizer

# A UNet of diffusers' for a refiner, of a few thousand parameters.
SMALL_UNET = {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def small_config(levels: tuple[int, ...] = (2, 4), **overrides) -> NextFlowConfig:
    """A NextFlow of a few thousand parameters with every part of the real one."""
    vq_config = {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 8,
            "num_patches": 16,
            "vision_use_head": False,
        },
        "codebook_size": 32,
        "semantic_dim": 6,
        "pixel_dim": 4,
        "latent_channels": 8,
        "encoder_channels": [8, 8, 8, 8],
        "encoder_layers": 1,
        "decoder_channels": [8, 8, 8, 8],
        "decoder_layers": 1,
        "norm_num_groups": 4,
        "semantic_decoder_layers": 1,
        "sides": [1, 2, 3, 4],
        "levels": list(levels),
        "final_grids": [[2, 6], [4, 4], [6, 2]],
    }
    text_config = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    own = {
        "vq_config": vq_config,
        "text_config": text_config,
        "code_start_id": 64,
        "boi_token_id": 3,
        "eoi_token_id": 4,
        "image_token_id": 5,
        "position_range": 4.0,
    }
    return NextFlowConfig(**{**own, **overrides})


def small_model(seed: int = 0, **overrides) -> NextFlowForConditionalGeneration:
    """A random small model whose head is sharp enough that codes are not all alike."""
    torch.manual_seed(seed)
    model = NextFlowForConditionalGeneration(small_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(1.5)
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
        torch.nn.init.normal_(model.model.scale_embedding.scale.weight, std=0.5)
    return model


def save_small_checkpoint(folder: Path) -> None:
    """Save a random model with its processor, as a user would have it."""
    tokenizer = train_tokenizer(["user\na red circle", "assistant\na star"] * 50, 320)
    text = {**small_model().config.text_config.to_dict(), "vocab_size": 320 + 32, "rope_parameters": None}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    model = small_model(text_config=text, code_start_id=320)
    model.config.codebook_fingerprint = model.vq_model.fingerprint()
    model.generation_config = GenerationConfig(
        eos_token_id=2, pad_token_id=0, image_top_k=5, image_guidance_scale=1.0, max_new_tokens=6
    )
    image_processor = NextFlowImageProcessorPil(
        buckets=buckets_from_schedule(model.config.schedule), resolution=32, downsample=8
    )
    model.save_pretrained(folder)
    NextFlowProcessor(image_processor, tokenizer).save_pretrained(folder)
