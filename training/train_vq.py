"""The tokenizer's stages (NextFlow section 3.1): teacher, pixel branch alone, both branches, pixel decoder alone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, reduce
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Siglip2Config, Siglip2Model, Siglip2VisionModel, TrainerCallback

from ..modeling.configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from ..modeling.modeling_nextflow_vq import (
    DualCodebook,
    NextFlowVQModel,
    NextFlowVQOutput,
    patchify,
    siglip2_features,
)
from .data import PairSource, load_source, to_pixels
from .processes import all_processes
from .recipe import Recipe
from .stage_trainer import run_stage, save_whole


class PictureDataset(Dataset):
    """Pictures of a source, with an answer's text where `words` asks for it."""

    def __init__(self, source: PairSource, words: bool = False):
        self.source = source
        self.words = words

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        item = {"image": self.source.image(index)}
        if self.words:
            item["text"] = self.source.question(index, np.random.default_rng(index))[1]
        return item


@dataclass
class ExtendingOutput(NextFlowVQOutput):
    """What a training step of the phase "extend" needs.

    Args:
        keep_loss (`torch.FloatTensor`): Squared distance of the encoder's outputs from the codes that were chosen
            before, of pictures that these showed well.
    """

    keep_loss: torch.FloatTensor | None = None


@dataclass
class PrefixOutput(NextFlowVQOutput):
    """What a training step of a pixel decoder needs that shows the first scales of pictures, too.

    Args:
        prefix_loss (`torch.FloatTensor`): Mean squared error of pictures of the first scales alone.
    """

    prefix_loss: torch.FloatTensor | None = None


class CodebookCallback(TrainerCallback):
    """Keeps the codebook the same in all processes: each moves dead codes onto outputs of its own pictures.

    The first process' codes are everyone's, and how often a code was chosen is everyone's mean.
    """

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if all_processes().num_processes == 1:
            return
        codebook = model.codebook
        codebook.usage.copy_(reduce(codebook.usage, "mean"))
        for table in (codebook.semantic.weight, codebook.pixel.weight):
            broadcast(table.data)


def train_teacher(recipe: Recipe) -> None:
    """Train a SigLIP2 model on pictures and their descriptions; its vision half is the semantic branch's start.

    `stage_args`: `text_layers`, `max_text_length`, `ema_decay` (0.999) of the averaged weights, which are the result;
    `init_from`: `tokenizer`.
    """
    # 1. A vision tower of the tokenizer's own shape, with the pooling head that contrast needs, and a text tower.
    vq_config = vq_config_of(recipe)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.init_from["tokenizer"])
    length = recipe.stage_args.get("max_text_length", 48)
    vision = {**vq_config.vision_config.to_dict(), "vision_use_head": True}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": vision["hidden_size"],
        "projection_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "num_hidden_layers": recipe.stage_args.get("text_layers", 2),
        "num_attention_heads": vision["num_attention_heads"],
        "max_position_embeddings": length,
    }
    model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))

    # 2. Contrast every picture of a batch with every description of it.
    def collate(items):
        pixels = torch.from_numpy(to_pixels(np.stack([item["image"] for item in items])))
        patches, grid = patchify(pixels, vq_config.downsample)
        words = tokenizer(
            [item["text"] for item in items],
            padding="max_length",
            truncation=True,
            max_length=length,
            padding_side="left",
            return_tensors="pt",
        )
        return {
            "input_ids": words.input_ids,
            "attention_mask": words.attention_mask,
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.tensor([grid]).repeat(len(items), 1),
        }

    dataset = PictureDataset(load_source(recipe.source), words=True)
    model = run_stage(recipe, model, dataset, collate, lambda model, batch: model(**batch, return_loss=True))

    # 3. Keep the vision half.
    save_whole(Path(recipe.output_dir) / "final", lambda folder: model.vision_model.save_pretrained(folder))


def train_vq(recipe: Recipe) -> None:
    """Train the tokenizer.

    `stage_args`: `phase`: "pixel" (reconstruction alone, not quantized), "joint" (everything), "extend" (other
    pictures, by the codes that are there and more, so that a decoder that draws with these goes on drawing), or
    "decoder" (the pixel decoder alone); `new_codebook`: false where the joint phase goes on with the codes that are
    there; `keep_weight`: how firmly the phase "extend" keeps what the encoder says of pictures that were shown well
    before; `ema_decay` (0.999) of the averaged weights, which are the result. `init_from`: `teacher` (in the phases
    "pixel" and "joint"), and `vq` to go on from. Of a tokenizer that goes on, `config` changes what weighs in its
    losses, `vq.scale_dropout`, `vq.dead_code_threshold`, and, in the phases "joint" and "extend", `vq.codebook_size`;
    the phase "decoder" changes `vq.decoder_channels`, `vq.decoder_layers`, `vq.scale_dropout` and `vq.prefix_scales`
    alone, and shows square pictures by these numbers of first scales, too, in a size of their own.

    Raises:
        ValueError: If there is no such phase, it does not change an entry of `config`, or `prefix_scales` meet a scale
            dropout, which would leave some of them out.
    """
    phase = recipe.stage_args.get("phase", "joint")
    if phase not in _TRAINED_PARTS:
        raise ValueError(f"A tokenizer's phase is one of {sorted(_TRAINED_PARTS)}, got {phase!r}.")
    source = load_source(recipe.source)
    if phase == "extend":
        _extend(recipe, source)
        return
    if phase == "decoder":
        _train_pixel_decoder(recipe, source)
        return

    # 1. The tokenizer of the stage before, or a new one whose semantic branch starts as its teacher.
    teacher = Siglip2VisionModel.from_pretrained(recipe.init_from["teacher"], vision_use_head=False)
    teacher.requires_grad_(False).eval()
    if "vq" in recipe.init_from:
        model = _going_on(recipe)
        if model.codebook.size != model.config.codebook_size:
            if phase != "joint":
                raise ValueError('Only the phase "joint" makes a new codebook; leave `vq.codebook_size` out.')
            model.codebook = DualCodebook(model.config)
    else:
        model = NextFlowVQModel(vq_config_of(recipe))
        model.semantic_encoder.load_state_dict(teacher.state_dict())
    _freeze_all_but(model, phase)
    if phase == "joint" and recipe.stage_args.get("new_codebook", True):
        model.start_codebook(_start_pictures(source), torch.Generator().manual_seed(0))
    model.to(memory_format=torch.channels_last)

    # 2. Reconstruct pixels and the frozen teacher's features.
    layer = model.config.semantic_layer

    def loss(model, batch):
        outputs = []
        for pixels in batch["pictures"]:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                targets = siglip2_features(teacher.to(pixels.device), pixels, layer)
            outputs.append(model(pixels, semantic_targets=targets, quantize=phase == "joint"))
        return _mean_losses(outputs, [len(pixels) for pixels in batch["pictures"]])

    model = run_stage(recipe, model, PictureDataset(source), _collate, loss, [CodebookCallback()])
    _save(model, recipe)


def _train_pixel_decoder(recipe: Recipe, source: PairSource) -> None:
    """Reconstruct pixels from codes that do not move, by a pixel decoder of the shape that the recipe asks for."""
    entries = {name.removeprefix("vq."): value for name, value in recipe.config.items()}
    if {*entries} - _DECODER_ENTRIES:
        raise ValueError(f'The phase "decoder" changes {sorted(_DECODER_ENTRIES)} alone, not {sorted(entries)}.')
    config = NextFlowVQConfig.from_pretrained(recipe.init_from["vq"], **entries)
    # What does not fit the earlier decoder's weights starts anew.
    model = NextFlowVQModel.from_pretrained(recipe.init_from["vq"], config=config, ignore_mismatched_sizes=True)
    # A code that these pictures do not need is another's.
    model.codebook.num_frozen = model.codebook.size
    _freeze_all_but(model, "decoder")
    model.to(memory_format=torch.channels_last)
    if config.prefix_scales and config.scale_dropout:
        raise ValueError("`prefix_scales` need all scales of a picture; set `config.vq.scale_dropout` to 0.")

    def loss(model, batch):
        pictures = [pixels.contiguous(memory_format=torch.channels_last) for pixels in batch["pictures"]]
        outputs = [model(pixels) for pixels in pictures]
        mean = _mean_losses(outputs, list(map(len, pictures)))
        errors = [
            _prefix_error(model, pixels, output.codes, scales)
            for pixels, output in zip(pictures, outputs)
            for scales in config.prefix_scales
            if pixels.shape[2] == pixels.shape[3] and scales < len(model.schedule.grids_for_size(*pixels.shape[-2:]))
        ]
        if not errors:
            return mean
        prefix_loss = torch.cat(errors).mean()
        mean["loss"] = mean.loss + prefix_loss
        return PrefixOutput(**mean, prefix_loss=prefix_loss.detach())

    model = run_stage(recipe, model, PictureDataset(source), _collate, loss, [CodebookCallback()])
    _save(model, recipe)


def _prefix_error(model: NextFlowVQModel, pixels: torch.Tensor, codes: torch.Tensor, scales: int) -> torch.Tensor:
    """Mean squared error `(batch,)` of pictures by their first scales, as pictures of those scales' size."""
    grids = model.schedule.grids_for_size(*pixels.shape[-2:])[:scales]
    first = codes[:, : sum(height * width for height, width in grids)]
    shown = model.decode_features(model.sum_features(first, grids))
    wanted = F.interpolate(pixels, size=shown.shape[-2:], mode="bicubic", antialias=True).clamp(-1, 1)
    return (shown - wanted).square().mean(dim=(1, 2, 3))


def _extend(recipe: Recipe, source: PairSource) -> None:
    """Learn other pictures without forgetting: the semantic branch and the codes that are there stay as they are."""
    # 1. The tokenizer, with new codes where those that are there fit worst if there are to be more, and as it was.
    before = NextFlowVQModel.from_pretrained(recipe.init_from["vq"]).eval().requires_grad_(False)
    model = _going_on(recipe)
    if model.config.codebook_size < before.codebook.size:
        raise ValueError(f'The phase "extend" keeps {before.codebook.size} codes; name a larger `vq.codebook_size`.')
    model.codebook = DualCodebook(model.config)
    model.codebook.freeze_rows(before.codebook)
    _freeze_all_but(model, "extend")
    if model.codebook.size > before.codebook.size:
        model.extend_codebook(_start_pictures(source), torch.Generator().manual_seed(0))
    model.to(memory_format=torch.channels_last)
    before.to(memory_format=torch.channels_last)

    # 2. Reconstruct; pictures that were shown well before keep their place before the codes.
    weight = recipe.stage_args.get("keep_weight", 4.0)

    def loss(model, batch):
        outputs = []
        for pixels in batch["pictures"]:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                before.to(pixels.device)
                wanted = before.encode(pixels).features
                error = (before.decode_features(wanted) - pixels).square().mean(dim=(1, 2, 3))
            output = model(pixels)
            moved = (output.latents - wanted).square().mean(dim=(1, 2, 3))
            keep_loss = ((error < _SHOWN_WELL) * moved).mean()
            losses = {name: own for name, own in output.items() if name.endswith("loss")}
            losses["loss"] = output.loss + weight * keep_loss
            outputs.append(ExtendingOutput(**losses, keep_loss=keep_loss.detach()))
        return _mean_losses(outputs, [len(pixels) for pixels in batch["pictures"]])

    model = run_stage(recipe, model, PictureDataset(source), _collate, loss, [CodebookCallback()])
    _save(model, recipe)


def _going_on(recipe: Recipe) -> NextFlowVQModel:
    """The tokenizer of the stage before, with the entries of `config` that its weights do not depend on."""
    entries = {name.removeprefix("vq."): value for name, value in recipe.config.items()}
    if {*entries} - _FREE_ENTRIES:
        raise ValueError(f"A tokenizer that goes on changes {sorted(_FREE_ENTRIES)} alone, not {sorted(entries)}.")
    model = NextFlowVQModel.from_pretrained(recipe.init_from["vq"])
    for name, value in entries.items():
        setattr(model.config, name, value)
    return model


def _freeze_all_but(model: NextFlowVQModel, phase: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in _TRAINED_PARTS[phase])


def _collate(items: list[dict]) -> dict:
    return {"pictures": by_size([item["image"] for item in items])}


def _save(model: NextFlowVQModel, recipe: Recipe) -> None:
    """The result is a tokenizer that loads on its own."""
    model.to(memory_format=torch.contiguous_format)
    model.requires_grad_(True)
    save_whole(Path(recipe.output_dir) / "final", lambda folder: model.save_pretrained(folder))


def _start_pictures(source: PairSource) -> list[torch.Tensor]:
    """Pictures that a codebook starts from, in small batches of one size."""
    return [
        part for batch in by_size([source.image(index) for index in range(_START_PICTURES)]) for part in batch.split(32)
    ]


def by_size(images: list[np.ndarray]) -> list[torch.Tensor]:
    """uint8 pictures `(height, width, 3)` as batches `(n, 3, height, width)` in [-1, 1], one for each size."""
    groups: dict[tuple, list[np.ndarray]] = {}
    for image in images:
        groups.setdefault(image.shape, []).append(image)
    return [torch.from_numpy(to_pixels(np.stack(own))) for own in groups.values()]


def _mean_losses(outputs: list[NextFlowVQOutput], pictures: list[int]) -> NextFlowVQOutput:
    """The losses of batches of several sizes as those of one batch: every picture counts as much."""
    names = [name for name in outputs[0] if name.endswith("loss")]
    total = sum(pictures)
    return type(outputs[0])(
        **{name: sum(own[name] * (number / total) for own, number in zip(outputs, pictures)) for name in names}
    )


_START_PICTURES = 256
# Mean squared error in [-1, 1] of a picture that a tokenizer shows well: 27 dB.
_SHOWN_WELL = 0.008
# What of the configuration may change while the weights are kept.
_FREE_ENTRIES = {"codebook_size", "commitment_weight", "dead_code_threshold", "scale_dropout", "semantic_weight"}
# What of the configuration the pixel decoder's own phase may change.
_DECODER_ENTRIES = {"decoder_channels", "decoder_layers", "prefix_scales", "scale_dropout"}
_PIXEL_PARTS = {"pixel_encoder", "pixel_proj", "post_pixel_proj", "pixel_decoder"}
_TRAINED_PARTS = {
    "pixel": _PIXEL_PARTS,
    "joint": _PIXEL_PARTS | {"semantic_encoder", "semantic_proj", "semantic_decoder", "codebook"},
    "extend": _PIXEL_PARTS | {"codebook"},
    "decoder": {"post_pixel_proj", "pixel_decoder"},
}


def vq_config_of(recipe: Recipe) -> NextFlowVQConfig:
    """The tokenizer's configuration: the preset's, with the recipe's entries (with or without `vq.` in front)."""
    config = NextFlowConfig.from_preset(recipe.preset).vq_config
    own = {name.removeprefix("vq."): value for name, value in recipe.config.items()}
    unknown = sorted(name for name in own if not hasattr(config, name))
    if unknown:
        raise ValueError(f"`config` has entries that the image tokenizer does not know: {unknown}.")
    return NextFlowVQConfig(**{**config.to_dict(), **own})
