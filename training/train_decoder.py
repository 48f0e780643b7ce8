"""The decoder's stages: drawing and reading pictures whose codes were extracted beforehand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerFast, TrainerCallback

from ..modeling.configuration_nextflow import NextFlowConfig
from ..modeling.modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling.modeling_nextflow_vq import NextFlowVQModel
from .code_extraction import extract_codes
from .coded_documents import CodedDocuments, MixedSequences
from .data import PairSource, load_source
from .packing import PackedSequences, SequenceCost, collate_packed, tokens_of
from .processes import all_processes
from .recipe import Recipe
from .sequences import SequenceBuilder
from .stage_trainer import run_stage, save_whole


class DrawAndReadDataset(Dataset):
    """Sequences that draw a picture or answer a question about it.

    Args:
        source: The pictures' words.
        codes: int `(pictures, num_codes)`.
        grids: Their scales.
        builder: Makes the sequences.
        read_share: Share of the items that read; the others draw.
        prompt_dropout: Share of the drawing items without a prompt, for classifier-free guidance.
        epochs: Length of the dataset in passes over the pictures; every pass words them anew.
    """

    def __init__(
        self,
        source: PairSource,
        codes: np.ndarray,
        grids: tuple,
        builder: SequenceBuilder,
        read_share: float,
        prompt_dropout: float,
        epochs: int,
    ):
        self.source, self.codes, self.grids, self.builder = source, codes, grids, builder
        self.read_share, self.prompt_dropout, self.epochs = read_share, prompt_dropout, epochs

    def __len__(self):
        return len(self.codes) * self.epochs

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        picture = index % len(self.codes)
        codes = self.codes[picture].tolist()
        if rng.random() < self.read_share:
            return self.builder.read(*self.source.question(picture, rng), codes, self.grids)
        prompt = None if rng.random() < self.prompt_dropout else self.source.prompt(picture, rng)
        return self.builder.draw(prompt, codes, self.grids)


class SampleGridCallback(TrainerCallback):
    """Draws the same prompts every so many steps and keeps the contact sheet as a PNG.

    Args:
        builder: Tokenizes as training does.
        prompts: What to draw, a column each.
        image_size: (height, width) in pixels.
        every: Steps between sheets.
        rows: Pictures per prompt.
    """

    def __init__(
        self, builder: SequenceBuilder, prompts: list[str], image_size: tuple[int, int], every: int, rows: int = 4
    ):
        self.builder, self.prompts, self.image_size, self.every, self.rows = builder, prompts, image_size, every, rows

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every and state.global_step % self.every == 0 and state.is_world_process_zero:
            self.draw(model, Path(args.output_dir) / "samples" / f"step-{state.global_step:06d}.png")

    def draw(self, model: NextFlowForConditionalGeneration, path: Path) -> None:
        training = model.training
        model.eval()
        texts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in self.prompts]
        inputs = self.builder.tokenizer(texts * self.rows, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            generation_mode="image",
            image_size=self.image_size,
            seed=0,
        )
        model.train(training)
        images = torch.stack(output.images).unflatten(0, (self.rows, len(self.prompts)))
        sheet = images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy()).save(path)


def train_decoder(recipe: Recipe) -> None:
    """Train the decoder on a frozen tokenizer.

    `init_from`: `tokenizer` (text), `vq`, and `decoder` to go on from. What it trains on is either `data` (extracted
    datasets, mixed by weight) or a `source` of pictures of one size. `stage_args`: `prefix_scales`, `prompt_dropout`,
    `sample_prompts`, `sample_every`, `image_size` of the samples, `abilities`, `sampling` (the `image_*` generation
    settings that the checkpoint is to carry), `attn_implementation`; for `data` also `sequences` (how many, before they
    come again) and `packing` (`unit`: "tokens" or "flops", `capacity`, `max_tokens`, `window`); for a `source`, `codes`
    (file of extracted codes), `read_share`, `epochs`.

    Raises:
        ValueError: If the recipe names neither `data` nor `source`, or an unknown unit.
    """
    stage = recipe.stage_args
    if bool(recipe.data) == bool(recipe.source):
        raise ValueError("A decoder's recipe needs either `data` (extracted datasets) or a `source` of pictures.")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.init_from["tokenizer"])
    vq_model = NextFlowVQModel.from_pretrained(recipe.init_from["vq"]).eval()

    # 1. Codes: extracted beforehand, or here, once.
    if recipe.source:
        source = load_source(recipe.source)
        with all_processes().main_process_first():
            codes, grids = extract_codes(source, vq_model, Path(stage["codes"]))
        image_size = vq_model.config.schedule.image_size(grids[-1])
    else:
        image_size = tuple(stage["image_size"])

    # 2. The decoder of the stage before, or a new one.
    model = _decoder_of(recipe, vq_model)
    if "attn_implementation" in stage:
        model.model.language_model.set_attn_implementation(stage["attn_implementation"])

    # 3. Draw and read.
    builder = SequenceBuilder(tokenizer, model.config, stage.get("prefix_scales"))
    if recipe.source:
        dataset = DrawAndReadDataset(
            source,
            codes,
            grids,
            builder,
            read_share=stage.get("read_share", 0.2),
            prompt_dropout=stage.get("prompt_dropout", 0.1),
            epochs=stage.get("epochs", 100),
        )
        collate = builder.collate
    else:
        dataset, collate = _mixed_data(recipe, builder, vq_model.fingerprint())
    model.generation_config = GenerationConfig(
        eos_token_id=builder.end_of_turn,
        pad_token_id=tokenizer.pad_token_id,
        **{f"image_{name}": value for name, value in stage.get("sampling", {}).items()},
    )
    samples = SampleGridCallback(builder, stage.get("sample_prompts", []), image_size, stage.get("sample_every", 0))
    model = run_stage(recipe, model, dataset, collate, lambda model, batch: model(**batch), [samples])

    # 4. The result says what it can do.
    model.config.abilities = stage.get("abilities")
    model.config.trained_image_sizes = [list(own) for own in stage.get("trained_image_sizes", [image_size])]
    model.vq_model.requires_grad_(True)
    save_whole(Path(recipe.output_dir) / "final", lambda folder: _save(model, tokenizer, folder))


def _decoder_of(recipe: Recipe, vq_model: NextFlowVQModel) -> NextFlowForConditionalGeneration:
    if "decoder" in recipe.init_from:
        model = NextFlowForConditionalGeneration.from_pretrained(recipe.init_from["decoder"])
        for name, value in recipe.config.items():
            setattr(model.config, name, value)
    else:
        own = {name: value for name, value in recipe.config.items() if not name.startswith(("vq.", "text."))}
        config = NextFlowConfig.from_preset(recipe.preset, vq_config=vq_model.config, **own)
        for name, value in recipe.config.items():
            if name.startswith("text."):
                setattr(config.text_config, name.removeprefix("text."), value)
        model = NextFlowForConditionalGeneration(config)
    model.config.codebook_fingerprint = vq_model.fingerprint()
    model.set_vq_model(vq_model)
    model.vq_model.requires_grad_(False)
    return model


def _mixed_data(recipe: Recipe, builder: SequenceBuilder, fingerprint: str) -> tuple[Dataset, Callable]:
    """Extracted datasets, mixed by weight and packed where the recipe says so, and how they are stacked."""
    stage = recipe.stage_args
    sequences = MixedSequences(
        [CodedDocuments(own["codes"], fingerprint) for own in recipe.data.values()],
        [own.get("weight", 1.0) for own in recipe.data.values()],
        builder,
        length=stage["sequences"],
        prompt_dropout=stage.get("prompt_dropout", 0.1),
        seed=recipe.trainer.get("seed", 0),
    )
    packing = dict(stage.get("packing") or {})
    if not packing:
        return sequences, builder.collate
    unit = packing.pop("unit", "flops")
    sizes = {"tokens": tokens_of, "flops": SequenceCost(builder.config)}
    if unit not in sizes:
        raise ValueError(f"The `unit` of packing is one of {sorted(sizes)}, got {unit!r}.")
    return PackedSequences(sequences, size_of=sizes[unit], **packing), collate_packed


def _save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
