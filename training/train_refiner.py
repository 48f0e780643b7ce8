"""The refiner's stage (NextFlow section 2.3): flow matching, told what the codes say, at one size and doubled."""

from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import ModelOutput

from ..modeling.modeling_nextflow_vq import NextFlowVQModel
from ..modeling.modeling_refiner import NextFlowRefinerModel, refiner_condition
from ..modeling.pipeline_refiner import NextFlowRefinerPipeline, caption_inputs
from .data import PairSource, load_source, to_pixels
from .processes import all_processes
from .recipe import Recipe
from .stage_trainer import run_stage, save_whole

# Which part of a base's pipeline is the denoiser.
_DENOISERS = {"FluxPipeline": "transformer", "StableDiffusionXLPipeline": "unet"}


class RefinerDataset(Dataset):
    """Pictures with captions, each to be painted at half its size, or doubled to its own.

    Args:
        source: The pictures, of twice the size at which the tokenizer sees them.
        doubled: Share of the items that are doubled.
        caption_dropout: Share of the items without a caption.
    """

    # Pictures of a small source come again, and what is done with them is drawn anew.
    MIN_LENGTH = 1_000_000

    def __init__(self, source: PairSource, doubled: float, caption_dropout: float):
        self.source, self.doubled, self.caption_dropout = source, doubled, caption_dropout

    def __len__(self):
        return max(len(self.source), self.MIN_LENGTH)

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((index, 5))
        index %= len(self.source)
        return {
            "image": self.source.image(index),
            "upsampling": 2 if rng.random() < self.doubled else 1,
            "caption": "" if rng.random() < self.caption_dropout else self.source.prompt(index, rng),
            # The share of the way from the decoder's picture to the true one that the refiner is shown.
            "is_clean": bool(rng.random() < 0.2),
        }


def train_refiner(recipe: Recipe) -> None:
    """Train a refiner on a frozen tokenizer.

    `init_from`: `vq`; `base` (a pipeline of diffusers, Hub id or folder, whose denoiser, VAE and text encoders are
    taken), or `refiner` to go on from, with its VAE and tokenizer (and text encoders of a `base`, if it had one);
    `tokenizer` for a new refiner that embeds captions itself.
    `config`: entries of [`NextFlowRefinerModel`], of a new one; those that the tokenizer decides are filled in.
    `stage_args`:

    * `base_pipeline`: class of `base`, a name of diffusers ("FluxPipeline", "StableDiffusionXLPipeline");
    * `base_dtype`: of what is taken from it, such as "bfloat16", for LoRA under autocast;
    * `lora` (arguments of `peft.LoraConfig`): the base is adapted, and what is new is trained whole; `final` is merged;
    * `doubled`: share of the pictures that are painted at twice the size that the tokenizer sees;
    * `caption_dropout`: share without a caption;
    * `ema_decay`: of the averaged weights, which are the result (0.999);
    * `gradient_checkpointing`: whether activations are computed again instead of kept;
    * `supersampling`: of the pipeline (1, or of the refiner that goes on);
    * `shift`: of the scheduler, above 1 for more steps in the noise (1, or of the refiner that goes on).

    The source's pictures are of twice the size that the tokenizer sees.

    Raises:
        ValueError: If the recipe has no start that it could train from, a share is none, or a refiner goes on without
            the text encoders that told it captions.
    """
    stage = recipe.stage_args
    shares = {name: stage.get(name, default) for name, default in (("doubled", 0.3), ("caption_dropout", 0.2))}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"`{name}` is a share in [0, 1], got {share}.")
    if "refiner" in recipe.init_from and recipe.config:
        raise ValueError(f"A refiner that goes on keeps its configuration; leave {sorted(recipe.config)} out.")
    if "base" in recipe.init_from and stage.get("base_pipeline") not in _DENOISERS:
        raise ValueError(f"`base_pipeline` is one of {sorted(_DENOISERS)}, got {stage.get('base_pipeline')!r}.")
    source = load_source(recipe.source)
    vq_model = NextFlowVQModel.from_pretrained(recipe.init_from["vq"]).eval().requires_grad_(False)

    # 1. The denoiser, its latents and its captions.
    tokenizer, vae, texts = None, None, None
    shift, supersampling = 1.0, 1
    if "tokenizer" in recipe.init_from:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.init_from["tokenizer"])
    config = {
        "semantic_dim": vq_model.config.semantic_dim,
        "pixel_dim": vq_model.config.pixel_dim,
        "feature_dim": vq_model.config.semantic_target_dim or vq_model.config.vision_config.hidden_size,
        **({"caption_vocab_size": len(tokenizer)} if tokenizer is not None else {}),
        **recipe.config,
    }
    base = _base_of(recipe) if "base" in recipe.init_from else None
    if "refiner" in recipe.init_from:
        earlier = NextFlowRefinerPipeline.from_pretrained(recipe.init_from["refiner"])
        model, vae, tokenizer = earlier.refiner, earlier.vae, earlier.tokenizer
        shift, supersampling = earlier.scheduler.config.shift, earlier.config.supersampling
        own = {name: model.config[name] for name in ("semantic_dim", "pixel_dim", "feature_dim")}
        if own != {name: config[name] for name in own}:
            raise ValueError(f"The refiner was made for codes of {own}, the tokenizer's are {config}.")
        # So many states stand for no caption where a base's text encoders told of captions.
        if base is None and model.config.no_caption_tokens > 1 and shares["caption_dropout"] < 1:
            raise ValueError(
                "This refiner was told captions by the text encoders of a base, without which it would be trained on "
                "none; name it as `init_from.base`, or say `caption_dropout: 1`."
            )
    elif base is not None:
        denoiser, vae = getattr(base, _DENOISERS[type(base).__name__]), base.vae
        patch = 2 if type(base).__name__ == "FluxPipeline" else 1
        config = {"sample_channels": vae.config.latent_channels, "patch_size": patch, **config}
        model = NextFlowRefinerModel.from_base(denoiser, **config)
    else:
        model = NextFlowRefinerModel(**config)
    if vae is not None:
        vae.eval().requires_grad_(False)
    if base is not None:
        texts = base
        base.register_modules(**{_DENOISERS[type(base).__name__]: None, "vae": None})
        for part in base.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        with torch.no_grad():
            model.register_to_config(no_caption_tokens=_states(texts, [""], "cpu")["encoder_hidden_states"].shape[1])
    if "lora" in stage:
        from peft import LoraConfig

        model.add_adapter(LoraConfig(**stage["lora"]))
        _train_what_is_new(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Small steps would be lost in half precision.
            parameter.data = parameter.data.float()
    if stage.get("gradient_checkpointing"):
        model.enable_gradient_checkpointing()
    shift = stage.get("shift", shift)
    pipeline = NextFlowRefinerPipeline(
        model,
        FlowMatchEulerDiscreteScheduler(shift=shift),
        vq_model,
        vae=vae,
        tokenizer=tokenizer,
        supersampling=stage.get("supersampling", supersampling),
    )

    # 2. Velocities of the flow from the picture to noise.
    dataset = RefinerDataset(source, **shares)
    collate, loss = partial(_collate, tokenizer), partial(_loss, pipeline, texts, shift)
    model = run_stage(recipe, model, dataset, collate, loss, [OwnNoiseCallback()])

    # 3. A pipeline that loads on its own.
    final = Path(recipe.output_dir) / "final"
    if "lora" in stage:
        model.fuse_lora()
        model.unload_lora()
    model.requires_grad_(True)
    if base is not None:
        model.to(getattr(torch, stage.get("base_dtype", "float32")))
    pipeline.refiner = model
    save_whole(final, pipeline.save_pretrained)


class OwnNoiseCallback(TrainerCallback):
    """Lets every process draw other noise: all begin with the run's seed."""

    def on_train_begin(self, args, state, control, **kwargs):
        processes = all_processes()
        if processes.num_processes > 1:
            torch.manual_seed(args.seed + 1_000_003 * processes.process_index)


def _base_of(recipe: Recipe) -> diffusers.DiffusionPipeline:
    """The pipeline whose parts a refiner takes."""
    pipeline_class = getattr(diffusers, recipe.stage_args["base_pipeline"])
    dtype = getattr(torch, recipe.stage_args.get("base_dtype", "float32"))
    return pipeline_class.from_pretrained(recipe.init_from["base"], torch_dtype=dtype)


def _train_what_is_new(model: NextFlowRefinerModel) -> None:
    """The projection and the widened input layer, which no base has learned, are trained whole beside the adapters."""
    layer = "denoiser.conv_in" if model.config.base_class == "UNet2DConditionModel" else "denoiser.x_embedder"
    for name, parameter in model.named_parameters():
        if name.startswith(("condition_proj", "upsampling_embedding", layer)) and "lora" not in name:
            parameter.requires_grad_(True)


def _collate(tokenizer, items: list[dict]) -> dict:
    """Items of one size and kind together."""
    kinds: dict[tuple, list[dict]] = {}
    for item in items:
        kinds.setdefault((item["upsampling"], item["image"].shape), []).append(item)
    groups = []
    for (factor, _), own in kinds.items():
        captions = [item["caption"] for item in own]
        group = {
            "pixels": torch.from_numpy(to_pixels(np.stack([item["image"] for item in own]))),
            "upsampling": factor,
            "is_clean": torch.tensor([item["is_clean"] for item in own]),
            "captions": captions,
        }
        if tokenizer is not None:
            group |= caption_inputs(tokenizer, captions)
        groups.append(group)
    return {"groups": groups}


def _loss(pipeline: NextFlowRefinerPipeline, texts, shift: float, model, batch: dict) -> ModelOutput:
    """Mean squared error of the velocity, every picture weighing alike."""
    total = sum(len(group["pixels"]) for group in batch["groups"])
    loss, terms = 0.0, {}
    for group in batch["groups"]:
        own = _group_loss(pipeline, texts, shift, model, group)
        loss = loss + own * (len(group["pixels"]) / total)
        terms.setdefault(f"x{group['upsampling']}_loss", []).append(own.detach())
    return ModelOutput(loss=loss, **{name: torch.stack(own).mean() for name, own in terms.items()})


def _group_loss(pipeline, texts, shift, model, group) -> torch.Tensor:
    device = next(model.parameters()).device
    for part in (pipeline.vq_model, pipeline.vae):
        if part is not None:
            part.to(device)
    large, factor = group["pixels"].to(device), group["upsampling"]
    caption = {name: group[name].to(device) for name in ("caption_ids", "caption_mask") if name in group}
    with torch.no_grad():
        # 1. What the tokenizer sees, what it would paint, and what is to be painted.
        small = F.avg_pool2d(large, 2)
        encoding = pipeline.vq_model.encode(small)
        painted = pipeline.vq_model.decode_features(encoding.features).clamp(-1, 1).float()
        shown = torch.where(group["is_clean"].to(device)[:, None, None, None], small, painted)
        if factor == 2:
            shown = F.interpolate(shown, scale_factor=2, mode="bicubic", align_corners=False).clamp(-1, 1)
        target = pipeline._to_latents(small if factor == 1 else large)
        condition = refiner_condition(pipeline.vq_model, encoding.codes, encoding.grids)
        if texts is not None:
            caption = _states(texts, group["captions"], device)
        # A doubled picture is seen in parts, for the cost of one that is not.
        place = _part_of(target, encoding.grids[-1]) if factor == 2 else None
        shown = pipeline._to_latents(shown)
        if place is not None:
            rows, columns, scale = place
            condition = condition[..., rows, columns]
            latent = [slice(own.start * scale, own.stop * scale) for own in (rows, columns)]
            target, shown = (own[..., latent[0], latent[1]] for own in (target, shown))
        # 2. A place on the way, as the scheduler's shift spreads them.
        noise = torch.randn_like(target)
        sigma = torch.sigmoid(torch.randn(len(target), device=device))
        sigma = (shift * sigma / (1 + (shift - 1) * sigma))[:, None, None, None]
        sample = (1 - sigma) * target + sigma * noise
    told = {"condition": condition, "upsampling": factor, **caption}
    if pipeline.refiner.config.image_condition:
        told["image"] = shown
    velocity = model(sample, 1000 * sigma.flatten(), **told).sample
    # In units of what is not known: without `image_error` the plain loss.
    scale = pipeline.refiner.velocity_scale(sigma)
    return ((velocity - (noise - target)).float() / scale).square().mean()


def _part_of(target: torch.Tensor, grid: tuple[int, int]) -> tuple[slice, slice, int]:
    """Half of a picture's rows and columns, in cells of its codes, and how many latents a cell has a side."""
    sides = [max(1, side // 2) for side in grid]
    starts = [int(torch.randint(whole - side + 1, ())) for whole, side in zip(grid, sides)]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, sides))
    return rows, columns, target.shape[-2] // grid[0]


def _states(texts, captions: list[str], device) -> dict:
    """The captions' states by a base's own text encoders; zeros, as at inference, where there is no caption."""
    texts.to(device)
    encoded = texts.encode_prompt(captions, captions, device=device)
    pooled = encoded[1] if type(texts).__name__ == "FluxPipeline" else encoded[2]
    said = torch.tensor([bool(own) for own in captions], device=device)
    return {"encoder_hidden_states": encoded[0] * said[:, None, None], "pooled_projections": pooled * said[:, None]}
