"""The decoder's stages: drawing and reading pictures whose codes were extracted beforehand."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.utils.data import Dataset
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import cached_file

from ..files import save_picture
from ..modeling.configuration_nextflow import ABILITIES, NextFlowConfig
from ..modeling.generation_nextflow import DEFAULT_SAMPLING
from ..modeling.modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling.modeling_nextflow_vq import NextFlowVQModel
from ..processing.image_processing_base_nextflow import buckets_from_schedule
from ..processing.image_processing_pil_nextflow import NextFlowImageProcessorPil
from ..processing.processing_nextflow import NextFlowProcessor
from .code_extraction import extract_codes
from .coded_documents import CodedDocuments, MixedSequences
from .data import PairSource, load_source
from .packing import PackedSequences, SequenceCost, collate_packed, tokens_of
from .processes import all_processes
from .recipe import Recipe
from .sequences import SequenceBuilder
from .sharding import is_sharded
from .stage_trainer import PictureCallback, run_stage, save_whole
from .vocabulary import with_vocabulary

_DTYPES = ("auto", "float32", "bfloat16")
_PACKING_UNITS = ("flops", "tokens")
# The `image_*` settings of generation.
_SAMPLING = {*DEFAULT_SAMPLING, "resampling"}


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


class SampleGridCallback(PictureCallback):
    """Draws the same prompts every so many steps; the contact sheet is kept as a PNG, and goes into the run's log.

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

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.every and is_sharded(model):
            raise ValueError(
                "Samples are drawn by one process, and the weights of this run are spread over several. Leave "
                "`sample_every` out, and draw with its checkpoints."
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every and state.global_step % self.every == 0 and state.is_world_process_zero:
            sheet = self.draw(model)
            path = Path(args.output_dir) / "samples" / f"step-{state.global_step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(Image.fromarray(sheet), path)
            self.report("samples", sheet, state.global_step)

    def draw(self, model: NextFlowForConditionalGeneration) -> np.ndarray:
        """A uint8 sheet `(rows * height, prompts * width, 3)`."""
        training = model.training
        model.eval()
        texts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in self.prompts]
        inputs = self.builder.tokenizer(texts * self.rows, return_tensors="pt", padding=True, padding_side="left")
        # Compiled layers are for training's shapes.
        with torch.compiler.set_stance("force_eager"):
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
        return ((sheet + 1) * 127.5).round().byte().cpu().numpy()


def train_decoder(recipe: Recipe) -> None:
    """Train the decoder on a frozen tokenizer.

    `init_from`: `tokenizer` (text), `vq`, and `decoder` to go on from, whatever text tokens and codes it had (but under
    `fsdp_size`); `adapter`, a LoRA of that decoder, to train it further, as it is (its own configuration counts, not
    `lora`), or beside `trained` parts to begin with it merged. What it trains on is either `data` (extracted datasets,
    mixed by weight) or a `source` of pictures of one size.
    `stage_args`:

    * what is trained: `trained` (regular expressions of how names of parameters begin; everything but the tokenizer
      where it is missing), or
      `lora` (arguments of `peft.LoraConfig`; the result has the adapter in `adapter` and is merged in `final`); with
      `head_rows: codes` the head's rows of text stay as they are, and no weight may decay;
    * how: `ema_decay` (of the averaged weights, which are the result: 0.999), `prefix_scales`, `prompt_dropout`,
      `attn_implementation`, `fsdp_size` (processes over which weights, gradients and the optimizer are sharded; goes on
      from a saved `decoder`), `dtype` (in which weights and the optimizer are kept; that in which `decoder` was saved
      where it is missing);
    * what the checkpoint carries: `abilities`, `sampling` (its `image_*` generation settings), `thinks` (whether its
      answers in words begin with a thought: `enable_thinking` of its generation settings), `image_sizes` (which it
      lists as trained; all that its data have where it is missing);
    * samples on the way: `sample_prompts`, `sample_every` (not where weights are sharded), of `image_size`;
    * for `data`: `image_size` ([height, width] that is drawn where no size is asked for), `sequences` (how many, before
      they come again), `task_inversion`, and `packing` (`unit`: "tokens" or "flops", `attention_weight`, `capacity`,
      `max_tokens`, `window`);
    * for a `source`: `codes` (file of extracted codes), `read_share`, `epochs`.

    Raises:
        ValueError: If the recipe names neither `data` nor `source`, an unknown unit, dtype or setting of sampling, a
            part that the model does not have, parts beside `lora`, or `head_rows` beside an adapter that is trained
            itself, or if it would shard a decoder that is not saved, or draw samples of no prompts or with one that is
            sharded.
    """
    stage = recipe.stage_args
    unknown = set(stage.get("abilities") or ()) - set(ABILITIES)
    if unknown:
        raise ValueError(f"`abilities` must be of {ABILITIES}, got {sorted(unknown)}.")
    if stage.get("sample_every") and "image" not in (stage.get("abilities") or ("image",)):
        raise ValueError(
            f'`sample_every` draws, but `abilities` are {stage["abilities"]}; name "image", or leave it out.'
        )
    if stage.get("sample_every") and not stage.get("sample_prompts"):
        raise ValueError("`sample_every` draws `sample_prompts`, and the recipe has none; name some, or leave it out.")
    unknown = set(stage.get("sampling") or ()) - _SAMPLING
    if unknown:
        raise ValueError(f"`sampling` has the settings {sorted(_SAMPLING)}, not {sorted(unknown)}.")
    merges = "adapter" in recipe.init_from and "trained" in stage
    if "adapter" in recipe.init_from and not merges and "head_rows" in stage:
        raise ValueError(
            "With `init_from.adapter` its own weights are trained; leave `head_rows` of `stage_args` out, or `adapter`."
        )
    if stage.get("dtype", "auto") not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {_DTYPES}, got {stage['dtype']!r}.")
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
        image_sizes = [image_size]
    else:
        documents = [CodedDocuments(own["codes"], vq_model.fingerprint()) for own in recipe.data.values()]
        if "image_size" not in stage:
            raise ValueError(
                "`stage_args.image_size` is missing: [height, width] of what is drawn where no size is asked."
            )
        image_size = tuple(stage["image_size"])
        image_sizes = {tuple(size) for own in documents for size in own.manifest["image_sizes"]}

    # 2. The decoder of the stage before, or a new one, and what of it is trained.
    model = _decoder_of(recipe, vq_model)
    if merges:
        model = PeftModel.from_pretrained(model, recipe.init_from["adapter"]).merge_and_unload()
    # What it could draw before, it can still; datasets of pictures that are only read have no sizes.
    image_sizes = {*image_sizes, *map(tuple, model.config.trained_image_sizes or ())}
    if "image_sizes" in stage:
        image_sizes = _listed(stage["image_sizes"], image_sizes)
    if stage.get("sample_every") and image_size not in image_sizes:
        raise ValueError(f"Samples of {image_size} cannot be drawn: trained are {sorted(image_sizes)}.")
    _freeze_all_but(model, stage)
    text_rows = _text_rows(model, recipe)
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
        dataset, collate = _mixed_data(recipe, builder, documents)
    model.generation_config = GenerationConfig(
        eos_token_id=builder.end_of_turn,
        pad_token_id=tokenizer.pad_token_id,
        **({"enable_thinking": True} if stage.get("thinks") else {}),
        **{f"image_{name}": value for name, value in (stage.get("sampling") or {}).items()},
    )
    # The model says what it can do; samples on the way are drawn by what it says.
    model.config.abilities = stage.get("abilities")
    # The first is what is drawn where no size is asked for.
    model.config.trained_image_sizes = [
        list(size) for size in sorted(image_sizes, key=lambda size: (size != image_size, size))
    ] or None
    # Settings of the model itself are made by now: merging gives it back.
    has_adapter = "lora" in stage or ("adapter" in recipe.init_from and not merges)
    if has_adapter:
        model = _with_adapter(model, recipe)
    samples = SampleGridCallback(builder, stage.get("sample_prompts", []), image_size, stage.get("sample_every", 0))
    model = run_stage(recipe, model, dataset, collate, _output_of, [samples, *text_rows])
    if has_adapter:
        save_whole(Path(recipe.output_dir) / "adapter", partial(_save_adapter, model))
        model = model.merge_and_unload()
    model.requires_grad_(True)
    save_whole(Path(recipe.output_dir) / "final", partial(_save, model, tokenizer), sharded="fsdp_size" in stage)


def _save_adapter(model, folder: Path) -> None:
    model.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _with_adapter(model: NextFlowForConditionalGeneration, recipe: Recipe):
    if "adapter" not in recipe.init_from:
        return get_peft_model(model, LoraConfig(**recipe.stage_args["lora"]))
    return PeftModel.from_pretrained(model, recipe.init_from["adapter"], is_trainable=True)


def _listed(sizes: list, found: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Sizes that the checkpoint is to list, of those that its data have."""
    listed = set(map(tuple, sizes))
    if not listed <= found:
        raise ValueError(f"`image_sizes` lists {sorted(listed - found)}, but the data have {sorted(found)}.")
    return listed


def _output_of(model: NextFlowForConditionalGeneration, batch: dict):
    # Nothing follows that would read a cache.
    return model(**batch, use_cache=False)


def _decoder_of(recipe: Recipe, vq_model: NextFlowVQModel) -> NextFlowForConditionalGeneration:
    fingerprint = vq_model.fingerprint()
    if "fsdp_size" in recipe.stage_args:
        return _sharded_decoder_of(recipe, fingerprint)
    if "decoder" in recipe.init_from:
        dtype = recipe.stage_args.get("dtype", "auto")
        model = NextFlowForConditionalGeneration.from_pretrained(recipe.init_from["decoder"], dtype=dtype)
        model = _with_vocabulary_of(recipe, model, vq_model)
        _set_entries(model, recipe.config)
    else:
        own = {name: value for name, value in recipe.config.items() if not name.startswith("text.")}
        _check_entries(own, NextFlowConfig.from_preset(recipe.preset))
        config = NextFlowConfig.from_preset(recipe.preset, vq_config=vq_model.config, **own)
        text = config.text_config.to_dict()
        # Derived from the number of layers.
        text.pop("layer_types", None)
        changed = {
            name.removeprefix("text."): value for name, value in recipe.config.items() if name.startswith("text.")
        }
        _check_entries(changed, config.text_config)
        text |= changed
        config.text_config = type(config.text_config)(**text)
        model = NextFlowForConditionalGeneration(config)
    model.config.codebook_fingerprint = fingerprint
    model.set_vq_model(vq_model)
    return model


def _with_vocabulary_of(
    recipe: Recipe, model: NextFlowForConditionalGeneration, vq_model: NextFlowVQModel
) -> NextFlowForConditionalGeneration:
    """The decoder with the recipe's text tokens and codes, where it was trained with others."""
    after = PreTrainedTokenizerFast.from_pretrained(recipe.init_from["tokenizer"])
    start = recipe.init_from["decoder"]
    has_own = cached_file(start, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is not None
    before = PreTrainedTokenizerFast.from_pretrained(start) if has_own else after
    same_text = before.get_vocab() == after.get_vocab()
    # Codes of another table are others, though as many.
    if same_text and vq_model.fingerprint() == model.vq_model.fingerprint():
        return model
    code_start_id = model.config.code_start_id
    if not same_text:
        code_start_id = NextFlowConfig.from_preset(recipe.preset).code_start_id
    return with_vocabulary(model, before, after, vq_model, code_start_id)


def _sharded_decoder_of(recipe: Recipe, fingerprint: str) -> NextFlowForConditionalGeneration:
    """The decoder with every weight spread over processes by FSDP2, as transformers shards it on loading."""
    from transformers.distributed import DistributedConfig

    if "decoder" not in recipe.init_from:
        raise ValueError("`fsdp_size` shards a decoder as it is loaded; name a saved one in `init_from.decoder`.")
    size, processes = recipe.stage_args["fsdp_size"], all_processes().num_processes
    if size != processes:
        raise ValueError(f"`fsdp_size` is {size}, but {processes} processes run; start as many (`torchrun`).")
    model = NextFlowForConditionalGeneration.from_pretrained(
        recipe.init_from["decoder"],
        dtype=recipe.stage_args.get("dtype", "auto"),
        distributed_config=DistributedConfig(fsdp_size=size),
    )
    _set_entries(model, recipe.config)
    if model.config.codebook_fingerprint != fingerprint:
        raise ValueError(
            f"The decoder {recipe.init_from['decoder']} has the image tokenizer {model.config.codebook_fingerprint}, "
            f"but `init_from.vq` is {fingerprint}. Under FSDP it cannot be exchanged."
        )
    return model


def _check_entries(entries: dict, config: PreTrainedConfig) -> None:
    unknown = [name for name in entries if not hasattr(config, name)]
    if unknown:
        raise ValueError(
            f"`config` has entries that {type(config).__name__} does not know: {unknown}. The shape of a decoder that "
            "goes on (`text.`) stays, and the image tokenizer (`vq.`) is changed in its own stages."
        )


def _set_entries(model: NextFlowForConditionalGeneration, entries: dict) -> None:
    _check_entries(entries, model.config)
    for name, value in entries.items():
        setattr(model.config, name, value)
    # Refuse before training what would be refused when the result is loaded.
    type(model.config)(**model.config.to_dict())


def _freeze_all_but(model: NextFlowForConditionalGeneration, stage: dict) -> None:
    """Freeze the image tokenizer, and what the stage does not train."""
    parts = stage.get("trained")
    if parts is not None and "lora" in stage:
        raise ValueError("A stage trains `trained` parts or `lora`, not both; `lora` has its own `modules_to_save`.")
    names = [name for name, _ in model.named_parameters()]
    for part in parts or ():
        try:
            re.compile(part)
        except re.error as error:
            raise ValueError(f"`trained` has {part!r}, which is no regular expression: {error}.") from error
    unknown = [part for part in parts or () if not any(re.match(part, name) for name in names)]
    if unknown:
        raise ValueError(f"No parameter's name begins with {unknown}; names begin like {sorted({*map(_part, names)})}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts is None or any(re.match(part, name) for part in parts))
    model.vq_model.requires_grad_(False)


class TextRowsCallback(TrainerCallback):
    """Leaves the head's rows of text as they are: their gradients are zero before every step.

    Args:
        rows: How many there are, the first of the head.
    """

    def __init__(self, rows: int):
        self.rows = rows

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if is_sharded(model) or args.deepspeed:
            raise ValueError("`head_rows: codes` needs a head that is whole on every process: no FSDP, no DeepSpeed.")

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.get_output_embeddings().weight.grad[: self.rows] = 0


def _text_rows(model: NextFlowForConditionalGeneration, recipe: Recipe) -> list[TrainerCallback]:
    """What trains the head's rows of codes alone, where the recipe says so."""
    rows = recipe.stage_args.get("head_rows")
    if rows is None:
        return []
    if rows != "codes":
        raise ValueError(f'`head_rows` must be "codes" or left out, got {rows!r}.')
    conflicts = {
        "a head that is not trained": not model.lm_head.weight.requires_grad,
        "a head that shares the embedding table": model.config.tie_word_embeddings,
        "`lora`": "lora" in recipe.stage_args,
        "`fsdp_size`": "fsdp_size" in recipe.stage_args,
        "a `weight_decay` other than 0": bool(recipe.trainer.get("weight_decay", 0.0)),
    }
    found = [name for name, holds in conflicts.items() if holds]
    if found:
        raise ValueError(f"`head_rows: codes` does not go with {' and '.join(found)}.")
    return [TextRowsCallback(model.config.code_start_id)]


def _part(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _mixed_data(recipe: Recipe, builder: SequenceBuilder, documents: list[CodedDocuments]) -> tuple[Dataset, Callable]:
    """Extracted datasets, mixed by weight and packed where the recipe says so, and how they are stacked."""
    stage = recipe.stage_args
    sequences = MixedSequences(
        documents,
        [own.get("weight", 1.0) for own in recipe.data.values()],
        builder,
        length=stage["sequences"],
        prompt_dropout=stage.get("prompt_dropout", 0.1),
        task_inversion=stage.get("task_inversion", 0.0),
        seed=recipe.trainer.get("seed", 0),
    )
    packing = dict(stage.get("packing") or {})
    if not packing:
        return sequences, builder.collate
    unit = packing.pop("unit", "flops")
    if unit not in _PACKING_UNITS:
        raise ValueError(f"The `unit` of packing is one of {_PACKING_UNITS}, got {unit!r}.")
    if unit == "tokens" and "attention_weight" in packing:
        raise ValueError("Bins of equal length know no `attention_weight`; leave it out, or pack by `unit: flops`.")
    size_of = tokens_of
    if unit == "flops":
        size_of = SequenceCost(builder.config, packing.pop("attention_weight", 1.0))
    return PackedSequences(sequences, size_of=size_of, endless=True, **packing), collate_packed


def _save(model, tokenizer, folder: Path) -> None:
    writes = all_processes().is_main_process
    model.save_pretrained(folder, is_main_process=writes)
    if writes:
        processor_for(model.config, tokenizer).save_pretrained(folder)


def processor_for(config: NextFlowConfig, tokenizer: PreTrainedTokenizerFast) -> NextFlowProcessor:
    """The processor of a checkpoint: pictures come at the level of the first size that it was trained for."""
    schedule = config.schedule
    sizes = config.trained_image_sizes
    scales = schedule.level_for_size(*sizes[0]) if sizes else schedule.levels[0]
    image_processor = NextFlowImageProcessorPil(
        buckets=buckets_from_schedule(schedule),
        resolution=schedule.sides[scales - 1] * schedule.downsample,
        downsample=schedule.downsample,
    )
    return NextFlowProcessor(image_processor, tokenizer, context_image=config.context_image)
