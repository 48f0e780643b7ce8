"""`nextflow-hf convert`: what others published, as checkpoints of ours.

Each conversion reads as the same steps: find the files, make the configuration, check every weight by name and shape,
say what will be done, and write a folder that is whole or absent.
"""

import hashlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Siglip2VisionConfig,
)
from transformers.dynamic_module_utils import custom_object_save

from . import __version__
from .files import write_whole
from .modeling import convert_qwen2_5_vl as qwen
from .modeling import convert_tokenflow as tokenflow
from .modeling.configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .modeling.modeling_nextflow_vq import NextFlowVQModel
from .modeling.modeling_tokenflow import TokenFlowForImageGeneration
from .modeling.weight_conversion import Dropped, apply_rules, bytes_made, check_rules
from .processing.processing_tokenflow import TokenFlowProcessor
from .processing.tokenization_nextflow import qwen_tokenizer
from .weight_files import WeightFiles, whole_folder, write_shards

# Where they are published, and under which licences.
TOKENFLOW_TOKENIZERS = "ByteFlow-AI/TokenFlow"
SIGLIP2 = "google/siglip2-so400m-patch16-naflex"
_CONFIG_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
# The reference's settings for one pass a scale.
_T2I_SAMPLING = {"image_guidance_scale": 7.5, "image_temperature": 1.0, "image_top_k": 600, "image_top_p": 0.6}


@dataclass
class Plan:
    """What a conversion will write.

    Attributes:
        model: The model on the meta device, for its configuration and the names of its weights.
        make: Makes the weights, but for those whose names it is given.
        needed_bytes: Space that the weights take.
        lines: What is done, for people.
        sources: What identifies the files and new weights that it is made of, to the letter.
        card: The model card.
        save: Writes what stands beside the weights into a folder.
    """

    model: PreTrainedModel
    make: Callable[[Set[str]], Iterator[tuple[str, torch.Tensor]]]
    needed_bytes: int
    lines: list[str]
    sources: list[str]
    card: str
    save: Callable[[Path], None] = field(default=lambda folder: None)

    def describe(self) -> str:
        """The plan in words."""
        parameters = sum(own.numel() for own in self.model.parameters())
        return "\n".join(
            [
                *self.lines,
                f"{type(self.model).__name__} with {parameters / 1e6:,.1f} million parameters, "
                f"{self.needed_bytes / 1e9:.2f} GB.",
            ]
        )

    def write(self, target: Path) -> None:
        """Write the checkpoint; the folder is whole or absent, and goes on where a killed run was."""
        config = self.model.config
        config.architectures = [type(self.model).__name__]
        tied = self.model._tied_weights_keys if getattr(config, "tie_word_embeddings", False) else {}
        names = [name for name in self.model.state_dict() if name not in tied]
        plan = "\n".join([self.describe(), f"nextflow_hf {__version__}", *self.sources])
        with whole_folder(target, plan, self.needed_bytes) as folder:
            write_shards(folder, self.make, names)
            if self.model._auto_class is not None:
                custom_object_save(self.model, folder, config=config)
            config.save_pretrained(folder)
            self.save(folder)
            write_whole(folder / "README.md", lambda file: file.write(self.card.encode()))


def fetch(source: str, patterns: tuple[str, ...]) -> Path:
    """A local file or folder as it is, or the files of a Hub repository that match, downloaded with progress.

    Raises:
        ValueError: If it is neither there nor a Hub id, or cannot be downloaded.
    """
    if Path(source).exists():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"There is no file or folder {source}, and it is no Hub id (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    # Names that are none, repositories that are not there or closed, and every failure of a network.
    except Exception as error:
        raise ValueError(f"{source} is no local path, and could not be downloaded from the Hub: {error}") from error


# ---- TokenFlow's tokenizers ------------------------------------------------------------------------------------------


def plan_tokenflow_tokenizer(source: str, variant: str | None = None) -> Plan:
    """A published TokenFlow tokenizer as a [`NextFlowVQModel`].

    Args:
        source: The file, a folder with it, or a Hub id.
        variant: One of `TOKENIZERS`; by default what the weights say, and for a Hub id `"clipb_256"`.

    Raises:
        ValueError: If the source is not there, is no such tokenizer, or its weights do not fit.
    """
    known = tokenflow.TOKENIZERS
    if variant is not None and variant not in known:
        raise ValueError(f"A variant is one of {sorted(known)}, got {variant!r}.")
    patterns = known[variant or "clipb_256"].files
    if not patterns and not Path(source).exists():
        raise ValueError(f"No file of {variant} was published; name a local file.")
    path = fetch(source, patterns)
    path = next((path / name for name in patterns if (path / name).is_file()), path)
    files = WeightFiles(path)
    shapes = files.shapes()
    found = tokenflow.tokenizer_variant(shapes)
    if variant is not None and known[variant].kind != known[found].kind:
        raise ValueError(f"{path} is not {variant}: its weights are those of {found}.")
    variant = variant or found
    config = tokenflow.tokenizer_config(shapes, known[variant])
    rules, dropped = tokenflow.tokenizer_rules(config)
    with torch.device("meta"):
        model = NextFlowVQModel(config)
    check_rules(rules, dropped, shapes, _shapes(model))
    return Plan(
        model,
        lambda skip: apply_rules(rules, files.load, skip),
        bytes_made(rules, shapes, files.dtype),
        [f"{path} is TokenFlow's tokenizer {variant}.", *_dropped_lines(dropped, shapes)],
        files.identity(),
        _card(
            f"TokenFlow tokenizer {variant}",
            "mit",
            f"The image tokenizer of TokenFlow (arXiv 2412.03069), converted from `{source}` (published as "
            f"`{TOKENFLOW_TOKENIZERS}` under the MIT licence; its semantic encoder began as "
            f"{'OpenAI CLIP ViT-B/16' if known[variant].kind == 'clip' else 'SigLIP so400m'}, see there). "
            f"It takes pictures of {config.image_size}x{config.image_size} pixels.",
            "from nextflow_hf import NextFlowVQModel\n\n"
            'tokenizer = NextFlowVQModel.from_pretrained("this folder")\n'
            "encoding = tokenizer.encode(pixel_values)  # (batch, 3, "
            f"{config.image_size}, {config.image_size}) in [-1, 1]\n"
            "pictures = tokenizer.decode(encoding.codes, encoding.grids)",
        ),
    )


def load_tokenizer(source: str) -> NextFlowVQModel:
    """An image tokenizer in float32: one of ours, or one of TokenFlow's as published; local or on the Hub."""
    path = fetch(source, ("config.json",))
    if (path / "config.json").is_file():
        model_type = _read_config(path).get("model_type")
        if model_type != NextFlowVQConfig.model_type:
            raise ValueError(f"{source} is a {model_type!r}, not an image tokenizer.")
        return NextFlowVQModel.from_pretrained(source, dtype=torch.float32).eval()
    plan = plan_tokenflow_tokenizer(source)
    model = NextFlowVQModel(plan.model.config).eval()
    model.load_state_dict(dict(plan.make(frozenset())))
    return model


# ---- TokenFlow's text-to-image model ---------------------------------------------------------------------------------


def plan_tokenflow_t2i(source: str, tokenizer: str = TOKENFLOW_TOKENIZERS) -> Plan:
    """TokenFlow's text-to-image model, with its image tokenizer, as a [`TokenFlowForImageGeneration`].

    Args:
        source: The folder with its weights, `config.json` and text tokenizer, or a Hub id.
        tokenizer: Its image tokenizer: a converted folder, the published file, or a Hub id.

    Raises:
        ValueError: If something is not there, the text tokenizer lacks a token, or the weights do not fit.
    """
    # What is small comes first, so that a mistake there is found before the weights are downloaded.
    path = fetch(source, _CONFIG_FILES)
    own_config, text_tokenizer = _read_config(path), _llama_tokenizer(path)
    vq_model = load_tokenizer(tokenizer)
    token_ids = _code_tokens(text_tokenizer, vq_model.config.codebook_size)
    files = WeightFiles(fetch(source, (*_CONFIG_FILES, "*.safetensors", "*.bin")))
    shapes = files.shapes()
    config = tokenflow.t2i_config(shapes, own_config, vq_model.config, **token_ids)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(text_tokenizer, name))
    config.codebook_fingerprint = vq_model.fingerprint()
    config.dtype = files.dtype("model.embed_tokens.weight")
    if vq_model.config.code_dim != shapes["model.mm_projector.0.weight"][1]:
        raise ValueError(
            f"The model takes codes of width {shapes['model.mm_projector.0.weight'][1]}, the image tokenizer "
            f"{tokenizer} has {vq_model.config.code_dim}."
        )
    rules, dropped = tokenflow.t2i_rules(config)
    with torch.device("meta"):
        model = TokenFlowForImageGeneration(config)
    own_shapes = {name: own for name, own in _shapes(model).items() if not name.startswith("model.vq_model.")}
    check_rules(rules, dropped, shapes, own_shapes)
    beside = {f"model.vq_model.{name}": own for name, own in vq_model.state_dict().items()}

    def save(folder: Path) -> None:
        GenerationConfig(pad_token_id=text_tokenizer.pad_token_id, **_T2I_SAMPLING).save_pretrained(folder)
        processor = TokenFlowProcessor(text_tokenizer, config.image_start_ids, config.prompt_length)
        processor.save_pretrained(folder)

    return Plan(
        model,
        lambda skip: itertools.chain(_handed_over(beside), apply_rules(rules, files.load, skip)),
        bytes_made(rules, shapes, files.dtype) + _bytes_of(beside),
        [
            f"{path} is TokenFlow's text-to-image model; its image tokenizer is {tokenizer}.",
            f"Codes begin at token {config.code_start_id}; <img> is {config.image_start_ids}.",
            *_dropped_lines(dropped, shapes),
        ],
        [*files.identity(), _digest(beside)],
        _card(
            "TokenFlow-t2i",
            "other",
            f"TokenFlow's text-to-image model (arXiv 2412.03069), converted from `{source}` and the image tokenizer "
            f"`{tokenizer}`. It was published as `ByteFlow-AI/TokenFlow-t2i` under Apache-2.0; it was trained from "
            "Llama 2, whose community licence holds as well, and its tokenizer is under the MIT licence. It draws "
            "256x256 pictures of a prompt of up to 128 tokens.",
            "import nextflow_hf\nfrom transformers import pipeline\n\n"
            'draw = pipeline("text-to-image", model="this folder", dtype="auto")\n'
            'draw("a lighthouse at dusk", negative_prompt="blurry, low quality", seed=7).save("picture.png")',
        ),
        save,
    )


def _llama_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The text tokenizer of a folder, from Llama 2's own kind of file where there is no other.

    Raises:
        ImportError: If that cannot be read without a package that is not installed.
        ValueError: If there is none, or it does not split text as Llama's does.
    """
    if (path / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(path)
    if not (path / "tokenizer.model").is_file():
        raise ValueError(f"There is neither a tokenizer.model nor a tokenizer.json in {path}.")
    absent = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if absent:
        raise ImportError(
            f'The text tokenizer {path / "tokenizer.model"} needs {absent}: pip install "nextflow-hf[convert]".'
        )
    tokenizer = LlamaTokenizer.from_pretrained(path)
    words = tokenizer.convert_ids_to_tokens(tokenizer("<img>", add_special_tokens=False).input_ids)
    if not words or not words[0].startswith("▁"):
        raise ValueError(f"{path / 'tokenizer.model'} makes {words} of <img>; Llama's makes words that begin with ▁.")
    return tokenizer


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _code_tokens(tokenizer: PreTrainedTokenizerBase, codes: int) -> dict:
    """Ids that the text tokenizer gives codes and `<img>`; nothing of it is taken for granted."""
    vocabulary = tokenizer.get_vocab()
    first, last = vocabulary.get("<vq_token_0>"), vocabulary.get(f"<vq_token_{codes - 1}>")
    if first is None or last != first + codes - 1:
        raise ValueError(
            f"The text tokenizer must have <vq_token_0> to <vq_token_{codes - 1}> side by side for the {codes} codes "
            f"of the image tokenizer; it has <vq_token_0> at {first} and <vq_token_{codes - 1}> at {last}."
        )
    absent = [name for name in ("bos_token_id", "pad_token_id") if getattr(tokenizer, name) is None]
    if absent:
        raise ValueError(f"The text tokenizer names no {absent}; TokenFlow's pads with [PAD] and begins with <s>.")
    opening = tokenizer("<img>", add_special_tokens=False).input_ids
    if not opening or tokenizer.unk_token_id in opening:
        raise ValueError(f"The text tokenizer makes {opening} of <img>, which must be known tokens.")
    return {"code_start_id": first, "image_start_ids": opening}


# ---- Qwen2.5-VL as a start -------------------------------------------------------------------------------------------


def plan_qwen2_5_vl(
    source: str, tokenizer: str | None = None, semantic_encoder: str | None = None, seed: int = 0
) -> Plan:
    """Qwen2.5-VL's language model and an image tokenizer as a NextFlow that is ready for the alignment stage.

    Args:
        source: The folder with its weights, `config.json` and text tokenizer, or a Hub id.
        tokenizer: The image tokenizer: one of ours, or TokenFlow's; without it a new one of the 7B's shape.
        semantic_encoder: The SigLIP2 that a new image tokenizer begins with; `SIGLIP2` by default.
        seed: Seed of all new weights.

    Raises:
        ValueError: If something is not there, both an image tokenizer and a semantic encoder are given, or the weights
            do not fit.
    """
    if tokenizer is not None and semantic_encoder is not None:
        raise ValueError("Give an image tokenizer, or the semantic encoder of a new one, not both.")
    # What is small comes first, so that a mistake there is found before the weights are downloaded.
    path = fetch(source, (*_CONFIG_FILES, "README.md"))
    model_type = _read_config(path).get("model_type")
    if model_type != "qwen2_5_vl":
        raise ValueError(f"{path} is a {model_type!r}, not a Qwen2.5-VL.")
    own_config, text_tokenizer = AutoConfig.from_pretrained(path), qwen_tokenizer(str(path))
    torch.manual_seed(seed)
    if tokenizer is not None:
        vq_model = load_tokenizer(tokenizer)
    else:
        vq_model = _new_tokenizer(semantic_encoder or SIGLIP2)
    _check_picture_size(vq_model.config)
    files = WeightFiles(fetch(source, (*_CONFIG_FILES, "*.safetensors", "README.md")))
    config = qwen.start_config(
        own_config.text_config,
        vq_model.config,
        own_config.tie_word_embeddings,
        **{f"{name}_id": getattr(text_tokenizer, f"{name}_id") for name in ("boi_token", "eoi_token", "image_token")},
    )
    config.codebook_fingerprint = vq_model.fingerprint()
    config.abilities = ["text"]
    config.dtype = files.dtype(next(name for name in files.shapes() if name.endswith("embed_tokens.weight")))
    rules = qwen.language_model_rules(config, files.shapes())
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config)
    beside = _new_parts(config) | {f"model.vq_model.{name}": own for name, own in vq_model.state_dict().items()}
    own_shapes = {name: own for name, own in _shapes(model).items() if name not in beside}
    dropped = qwen.DROPPED
    if config.tie_word_embeddings:
        own_shapes.pop("lm_head.weight")
        dropped += (Dropped("lm_head.", "the head shares the embedding table"),)
    check_rules(rules, dropped, files.shapes(), own_shapes)

    def save(folder: Path) -> None:
        from .training.train_decoder import processor_for

        processor_for(config, text_tokenizer).save_pretrained(folder)
        if (path / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(path).save_pretrained(folder)

    image_tokenizer = tokenizer or f"a new one that begins with {semantic_encoder or SIGLIP2}"
    return Plan(
        model,
        lambda skip: itertools.chain(_handed_over(beside), apply_rules(rules, files.load, skip)),
        bytes_made(rules, files.shapes(), files.dtype) + _bytes_of(beside),
        [
            f"The language model of {path}; its image tokenizer is {image_tokenizer}.",
            f"Codes begin at token {config.code_start_id}; the new rows are the mean of the old ones.",
            f"New weights have the seed {seed}: connector, scale embedding"
            + ("." if tokenizer else ", and the image tokenizer but for its semantic encoder."),
            *_dropped_lines(dropped, files.shapes()),
        ],
        [*files.identity(), _digest(beside)],
        _card(
            "NextFlow, not yet trained",
            _licence_of(path),
            f"The start of a NextFlow (arXiv 2601.02204): the language model of `{source}`, whose licence holds "
            "(Qwen2.5-VL-7B: Apache-2.0; other sizes have others), and as its image tokenizer "
            f"{image_tokenizer} (SigLIP2 so400m: Apache-2.0; TokenFlow's tokenizers: MIT). It answers text as Qwen "
            "does; it has not learned to draw or to look at pictures: train it with the recipes `7b-*`, the alignment "
            "stage first.",
            "from nextflow_hf import NextFlowForConditionalGeneration\n\n"
            'model = NextFlowForConditionalGeneration.from_pretrained("this folder")',
        ),
        save,
    )


def _new_tokenizer(semantic_encoder: str) -> NextFlowVQModel:
    """A new image tokenizer of the 7B's shape around a SigLIP2."""
    path = fetch(semantic_encoder, ("config.json", "*.safetensors"))
    vision = getattr(AutoConfig.from_pretrained(path), "vision_config", None)
    if not isinstance(vision, Siglip2VisionConfig):
        raise ValueError(f"{path} is no SigLIP2: its `vision_config` is {type(vision).__name__}.")
    vision.vision_use_head = False
    return with_semantic_encoder(NextFlowVQConfig(vision_config=vision), WeightFiles(path))


def with_semantic_encoder(config: NextFlowVQConfig, files: WeightFiles) -> NextFlowVQModel:
    """A new image tokenizer with the semantic encoder of a SigLIP2.

    Raises:
        ValueError: If the weights do not fit.
    """
    model = NextFlowVQModel(config).eval()
    prefix = "model.vq_model.semantic_encoder."
    own = {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in model.semantic_encoder.state_dict().items()}
    rules = qwen.siglip2_rules([name.removeprefix(prefix) for name in own])
    check_rules(rules, qwen.SIGLIP2_DROPPED, files.shapes(), own)
    weights = apply_rules(rules, files.load)
    model.semantic_encoder.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights})
    return model


def _new_parts(config: NextFlowConfig) -> dict[str, torch.Tensor]:
    """Connector and scale embedding as a new model has them, in the checkpoint's dtype."""
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config)
    parts = {"connector": model.model.connector, "scale_embedding": model.model.scale_embedding}
    weights = {}
    for name, part in parts.items():
        part.to_empty(device="cpu")
        part.apply(model._init_weights)
        weights |= {f"model.{name}.{own}": tensor.to(config.dtype) for own, tensor in part.state_dict().items()}
    return weights


def _check_picture_size(config: NextFlowVQConfig) -> None:
    side = config.schedule.sides[-1] * config.schedule.downsample
    if config.image_size not in (None, side):
        raise ValueError(
            f"This image tokenizer takes pictures of {config.image_size} pixels for a grid of {side} pixels; a decoder "
            "needs one whose pictures are as large as its grid, such as TokenFlow's clipb_256 or ours."
        )


# ---- what all of them need -------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict:
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"There is no config.json in {path}.")
    return json.loads(file.read_text())


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(own.shape) for name, own in model.state_dict().items()}


def _handed_over(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights one by one, each forgotten here when it is taken."""
    for name in list(weights):
        yield name, weights.pop(name)


def _digest(weights: dict[str, torch.Tensor]) -> str:
    """A hash of the weights' names and content."""
    digest = hashlib.sha256()
    for name, own in weights.items():
        digest.update(name.encode())
        digest.update(own.contiguous().view(torch.uint8).numpy() if own.ndim else str(own.item()).encode())
    return digest.hexdigest()


def _licence_of(path: Path) -> str:
    """What the model card in a folder says; "other" where there is none."""
    card = path / "README.md"
    return (ModelCard.load(card).data.license if card.is_file() else None) or "other"


def _bytes_of(weights: dict[str, torch.Tensor]) -> int:
    return sum(own.numel() * own.element_size() for own in weights.values())


def _dropped_lines(dropped: tuple[Dropped, ...], shapes) -> list[str]:
    lines = []
    for own in dropped:
        number = sum(name.startswith(own.prefix) for name in shapes)
        if number:
            lines.append(f"{number} weights {own.prefix}* are left out: {own.reason}.")
    return lines


def _card(title: str, licence: str, text: str, code: str) -> str:
    return (
        f"---\nlicense: {licence}\nlibrary_name: transformers\ntags: [nextflow, next-scale-prediction]\n---\n\n"
        f"# {title}\n\n{text}\n\n```python\n{code}\n```\n"
    )


__all__ = ["Plan", "load_tokenizer", "plan_qwen2_5_vl", "plan_tokenflow_t2i", "plan_tokenflow_tokenizer"]
