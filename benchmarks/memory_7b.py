"""Memory that the 7B shape needs for each way of loading and of training, and the smallest card that it fits.

How it is counted. The real model (`NextFlowConfig.from_preset("nextflow-7b")`) is built on the meta device and runs on
tensors that have shapes and types but no values (`FakeTensorMode`); integers, which say where a picture lies, are real.
It runs what users run: `generate(generation_mode="image")` with guidance, or steps as the trainer makes them (bfloat16
autocast, backward, clipping, fused AdamW, the average of the weights). A dispatch mode keeps account of every storage
from its making to its end; the greatest sum of those alive at once is the peak, and the parts given are what is alive
at that moment. One sequence: a text prompt and one square picture. Attention is `block_varlen`: run by run without a
mask in training, and SDPA with a mask behind a cache.

How it is checked. `--check` runs mini's shape, made wider, for real: every way in a process of its own, whose peak
resident memory is compared with the count of the same run.

What is counted by a rule and not run: quantised weights (bits per weight and the constants of each block), 8-bit Adam
(a byte a moment and a float32 per 256 weights; embeddings keep float32), what quantised products hold on the way,
weights on the CPU, and FSDP2 (an equal share of all that is sharded, and the layers that are whole at a time).

    python benchmarks/memory_7b.py            # counts and checks, writes benchmarks/results/memory_7b.json
    python benchmarks/memory_7b.py --check    # the check alone
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from common import RESULTS, record, table, write_json
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import TrainerState

from nextflow_hf.modeling.block_attention import BLOCK_VARLEN
from nextflow_hf.modeling.chunked_cross_entropy import chunked_cross_entropy
from nextflow_hf.modeling.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.training.stage_trainer import EmaCallback

GB = 1e9
CARDS = (8, 16, 24, 48, 80)
# Left free on every card: CUDA context, kernels' own work space, fragmentation.
RESERVE_SHARE, RESERVE_BYTES = 0.05, 1.0 * GB
PROMPT_LENGTH = 100
# The parts of training/recipes/7b-align.yaml, and the modules of examples/finetune_pictures.py.
ALIGNED_PARTS = ("model.connector", "lm_head")
LORA_TARGETS = r".*language_model\.layers\..*_proj|.*connector\.linear_[12]"
LORA_RANK = 16
# bitsandbytes: NF4 with blocks of 64, whose constants are 8 bits with a float32 per 256 of them.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
ADAM_8BIT_BYTES = 2 * (1 + 4 / 256)


class LiveStorages(TorchDispatchMode):
    """Account of the storages that are alive, by kind, and of the moment with the most bytes in every phase of a run.

    Integers and truth values of valueless tensors become real zeros and ones, so that code which looks at them runs.

    Attributes:
        live: Bytes alive now, by kind.
        phase: Name of the phase; whoever runs the model sets it.
        at_peak: The bytes by kind at the peak of each phase.
        most_activations: In each phase the greatest sum of activations and cast weights, at whatever moment.
    """

    def __init__(self):
        super().__init__()
        self.known: dict[int, tuple] = {}
        self.live: Counter = Counter()
        self.phase = ""
        self.at_peak: dict[str, dict[str, int]] = {}
        self.most_activations: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args)
        inputs = [own for own in tree_flatten((args, kwargs))[0] if isinstance(own, torch.Tensor)]
        valueless = any(isinstance(own, FakeTensor) for own in inputs)
        if valueless and func is torch.ops.aten.index.Tensor:
            # A mask's number of places is not known without values; the mask is real.
            places = [_places(own) for own in args[1]]
            args = (args[0], [own for some in places for own in some])
        out = func(*args, **kwargs)
        if valueless:
            out = tree_map_only(FakeTensor, _real_where_whole, out)
        kind = "activations"
        if func is torch.ops.aten._to_copy.default and self.kind_of(args[0]) == "weights":
            kind = "weights cast"
        for own in tree_flatten(out)[0]:
            if isinstance(own, torch.Tensor):
                self.see(own, kind)
        return out

    def kind_of(self, tensor: torch.Tensor) -> str | None:
        known = self.known.get(tensor.untyped_storage()._cdata)
        return known and known[0]

    def see(self, tensor: torch.Tensor, kind: str, again: bool = False) -> None:
        """Enter a tensor's storage; one that is known keeps its kind, unless `again`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            if not again:
                return
            self.forget(key)
        self.known[key] = (kind, storage.nbytes(), weakref.ref(storage, lambda _: self.forget(key)))
        self.live[kind] += storage.nbytes()
        most = self.live["activations"] + self.live["weights cast"]
        self.most_activations[self.phase] = max(self.most_activations.get(self.phase, 0), most)
        if self.live.total() > sum(self.at_peak.get(self.phase, {}).values()):
            self.at_peak[self.phase] = dict(self.live)

    def forget(self, key: int) -> None:
        kind, size, _ = self.known.pop(key)
        self.live[kind] -= size

    def restart(self, phase: str) -> None:
        """Forget the peaks so far, and begin a phase."""
        self.phase, self.at_peak, self.most_activations = phase, {phase: dict(self.live)}, {}


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    if index is None or index.dtype != torch.bool:
        return [index]
    return list(index.nonzero(as_tuple=True))


def _real_where_whole(tensor: FakeTensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor
    return torch.full(tensor.shape, tensor.dtype == torch.bool, dtype=tensor.dtype)


def without_values(model: nn.Module) -> nn.Module:
    """Put tensors without values in place of a model's parameters and buffers on the meta device.

    The codebook alone, 5 MB, becomes real, so that what the slots are fed is computed at speed.
    """
    made: dict[int, torch.Tensor] = {}
    real = {id(own) for name, own in model.named_parameters() if ".codebook." in name}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, own in module._parameters.items():
                if own is not None:
                    if id(own) not in made:
                        with unset_fake_temporarily() if id(own) in real else nullcontext():
                            empty = torch.zeros(own.shape, dtype=own.dtype)
                        made[id(own)] = nn.Parameter(empty, requires_grad=own.requires_grad)
                    module._parameters[name] = made[id(own)]
            for name, own in module._buffers.items():
                if own is not None:
                    module._buffers[name] = torch.empty(own.shape, dtype=own.dtype)
    return model


def small_config() -> NextFlowConfig:
    """Mini's shape with a head of its own and wider layers: tensors outweigh what allocator and kernels hold."""
    text = NextFlowConfig.from_preset("nextflow-mini").text_config.to_dict()
    text |= {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    return NextFlowConfig.from_preset("nextflow-mini", text_config=text, tie_word_embeddings=False)


def build(config: NextFlowConfig, dtype: torch.dtype, way: str, counted: bool) -> nn.Module:
    """The model, with what the way trains thawed; without values if it is only counted."""
    with torch.device("meta" if counted else "cpu"):
        model = NextFlowForConditionalGeneration._from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(way == "full" or (way == "align" and name.startswith(ALIGNED_PARTS)))
        model.vq_model.requires_grad_(False)
        model.model.language_model.set_attn_implementation(BLOCK_VARLEN)
        if way == "lora":
            targets = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS)
            model = get_peft_model(model, targets)
    return without_values(model) if counted else model


def one_sequence(config: NextFlowConfig, size: int, rows: int, prompt_length: int) -> dict[str, torch.Tensor]:
    """`rows` sequences of a prompt and a picture of `size` x `size` pixels, with labels on the picture and its end."""
    grids = config.schedule.grids_for_size(size, size)
    slots = sum(height * width for height, width in grids[1:])
    text = [config.code_start_id - 1]
    ids = text * prompt_length + [config.boi_token_id] + [config.image_token_id] * slots + [config.eoi_token_id] + text
    input_ids = torch.tensor([ids]).repeat(rows, 1)
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = text[0]
    codes = torch.randint(config.vq_config.codebook_size, (rows, slots + 1))
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "image_codes": codes,
        "image_labels": codes,
        "image_grids": torch.tensor([grids]).repeat(rows, 1, 1),
    }


def train(model: nn.Module, batch: dict, checkpointing: bool, account: LiveStorages | None = None) -> int:
    """One step as `run_stage` makes it, not the first: the optimizer's states are there before it begins.

    Returns:
        Bytes that the forward pass keeps for the backward pass, if there is an account.
    """
    model.train()
    # As `Trainer` does.
    model.config.use_cache = model.config.text_config.use_cache = False
    if checkpointing:
        model.activation_checkpointing_enable()
    trained = [own for own in model.parameters() if own.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for own in trained:
        own.grad = torch.zeros_like(own)
    optimizer.step()
    optimizer.zero_grad()
    average = EmaCallback(0.999, None)
    average.on_train_begin(None, None, None, model=model)
    before = saved = 0
    if account is not None:
        states = [own for state in optimizer.state.values() for own in state.values()]
        kept = {"weights": model.parameters(), "average": average.average.values(), "optimizer": states}
        for kind, tensors in kept.items():
            for own in tensors:
                account.see(own, kind, again=True)
        for own in trained:
            own.register_post_accumulate_grad_hook(lambda own: account.see(own.grad, "gradients", again=True))
        _mark_phases(model, account)
        account.restart("forward, loss, last layer")
        before = account.live.total()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    if account is not None:
        saved = account.live.total() - before
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    average.on_step_end(None, TrainerState(global_step=1), None, model=model)
    optimizer.zero_grad()
    return saved


def _mark_phases(model: nn.Module, account: LiveStorages) -> None:
    """Tell the account when the backward pass leaves the last layer, and when it comes to the first."""
    layers = next(own for name, own in model.named_modules() if name.endswith("language_model.layers"))
    for layer, phase in ((layers[-1], "layers between"), (layers[1], "first layer, embeddings, optimizer")):

        def hook(_, inputs, phase=phase):
            inputs[0].register_hook(lambda _: setattr(account, "phase", phase))

        layer.register_forward_pre_hook(hook)


def draw(model: nn.Module, size: int, pictures: int, prompt_length: int, account: LiveStorages | None = None) -> int:
    """Draw pictures of `size` x `size` pixels with guidance.

    Returns:
        Bytes of the key-value cache after the last scale.
    """
    model.eval()
    if account is not None:
        for own in model.parameters():
            account.see(own, "weights", again=True)
        account.restart("scales")
    caches, make_cache = [], model._make_cache

    def make_and_look(*args):
        cache = make_cache(*args)
        caches.append(weakref.ref(cache))
        return cache

    cache_bytes = 0

    def measure(step):
        nonlocal cache_bytes
        if account is not None and step.scale == step.num_scales - 1:
            account.phase = "pixel decoder"
        tensors = [own for layer in caches[-1]().layers for own in (layer.keys, layer.values)]
        cache_bytes = sum(own.numel() * own.element_size() for own in tensors)

    model._make_cache = make_and_look
    prompt = torch.full((pictures, prompt_length), model.config.code_start_id - 1)
    model.generate(
        prompt,
        generation_mode="image",
        image_size=(size, size),
        guidance_scale=5.0,
        seed=0,
        callback_on_scale_end=measure,
    )
    return cache_bytes


def with_layers(config: NextFlowConfig, layers: int) -> NextFlowConfig:
    """The same shape with another number of decoder layers."""
    text = config.text_config.to_dict()
    # Derived from the number of layers.
    text.pop("layer_types", None)
    own = config.to_dict() | {"text_config": text | {"num_hidden_layers": layers}}
    return NextFlowConfig(**{name: value for name, value in own.items() if name not in ("model_type", "auto_map")})


def run_on_shapes(config: NextFlowConfig, dtype: torch.dtype, way: str, checkpointing: bool, **sequence) -> dict:
    """Bytes of one way on shapes alone. `sequence`: `size`, `rows`, `prompt_length`."""
    model = build(config, dtype, way, counted=True)
    with LiveStorages() as account:
        if way == "draw":
            own = {"cache": draw(model, sequence["size"], sequence["rows"], sequence["prompt_length"], account)}
        else:
            own = {"saved for backward": train(model, one_sequence(config, **sequence), checkpointing, account)}
    own["gradients"] = sum(own.numel() * own.element_size() for own in model.parameters() if own.requires_grad)
    own |= {f"activations/{phase}": most for phase, most in account.most_activations.items()}
    for phase, kinds in account.at_peak.items():
        own |= {f"peak/{phase}/{kind}": size for kind, size in kinds.items()}
    return own


def count(config: NextFlowConfig, dtype: torch.dtype, way: str, checkpointing: bool, **sequence) -> dict:
    """Bytes of one way at its peak.

    Layers are alike, so in every phase each kind of bytes is linear in their number: two small numbers of layers tell
    the rest. Of the backward pass, what lies between the last layer and the first is less than one of its ends.
    """
    layers = config.text_config.num_hidden_layers
    few, more = (run_on_shapes(with_layers(config, own), dtype, way, checkpointing, **sequence) for own in (2, 3))
    names = few.keys() | more.keys()
    found = {
        own: few.get(own, 0) + (more.get(own, 0) - few.get(own, 0)) * (layers - 2)
        for own in names
        if "layers between" not in own
    }
    peaks: dict[str, dict[str, int]] = {}
    for name, size in found.items():
        if name.startswith("peak/"):
            _, phase, kind = name.split("/")
            peaks.setdefault(phase, {})[kind] = size
    phase = max(peaks, key=lambda own: sum(peaks[own].values()))
    return {
        "peak": sum(peaks[phase].values()),
        "at_peak": peaks[phase],
        "phase": phase,
        "most_activations": max(size for name, size in found.items() if name.startswith("activations/")),
        **{name: size for name, size in found.items() if "/" not in name},
    }


def count_loss(config: NextFlowConfig, dtype: torch.dtype, rows: int) -> int:
    """Bytes that the head's loss over `rows` rows adds to the hidden states, the head and the gradients of both."""
    width, vocabulary = config.text_config.hidden_size, config.text_config.vocab_size
    with LiveStorages() as account:
        with torch.device("meta"):
            head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        head = without_values(head)
        hidden = head.weight.new_empty(rows, width, dtype=torch.bfloat16).requires_grad_()
        for own in (head.weight, hidden):
            account.see(own, "weights", again=True)
        account.restart("loss")
        before = account.live.total()
        with torch.autocast("cpu", torch.bfloat16):
            # As in training: text and codes, whose means pass the head together.
            sizes = [rows // 10, rows - rows // 10]
            labels, weights = torch.zeros(rows, dtype=torch.long), torch.ones(rows) / rows
            # A parameter without values is of a class of its own, which is not taken for a plain head's.
            with mock.patch("nextflow_hf.modeling.chunked_cross_entropy.is_plain", lambda *own: True):
                means, _ = chunked_cross_entropy(head, hidden, labels, weights, sizes)
        sum(means).backward()
    gradients = sum(own.numel() * own.element_size() for own in (head.weight, hidden))
    return sum(account.at_peak["loss"].values()) - before - gradients


# ---- what is counted by a rule -----------------------------------------------------------------------------------


def layer_weights(model: nn.Module) -> dict[str, int]:
    """Numbers of weights that the rules need."""
    decoder = model.model.language_model
    linear = [own for own in decoder.layers.modules() if isinstance(own, nn.Linear)]
    return {
        "decoder layers": sum(own.numel() for own in decoder.layers.parameters()),
        "one layer": sum(own.numel() for own in decoder.layers[0].parameters()),
        "linear of layers": sum(own.weight.numel() for own in linear),
        "rows of linear": sum(own.weight.shape[0] for own in linear),
        "largest linear": max(own.weight.numel() for own in linear),
        "widest input and output": max(own.in_features + 4 * own.out_features for own in linear),
        "embeddings": decoder.embed_tokens.weight.numel(),
        "head": model.lm_head.weight.numel(),
        "trained": sum(own.numel() for own in model.parameters() if own.requires_grad),
        "root of FSDP": sum(
            own.numel()
            for part in (model.vq_model, model.model.connector, model.model.scale_embedding)
            for own in part.parameters()
        ),
    }


def quantised(weights: dict[str, int], bits: int, slots: int) -> int:
    """Bytes that the bfloat16 linear weights of the layers shrink by, less what a quantised product holds on the way.

    8 bits: a byte a weight, a float32 per row, and int8 inputs and int32 outputs of `slots` rows. 4 bits: NF4 with
    quantised constants, and the largest matrix in bfloat16.
    """
    before = 2 * weights["linear of layers"]
    if bits == 8:
        after = weights["linear of layers"] + 4 * weights["rows of linear"]
        return before - after - slots * weights["widest input and output"]
    return before - int(weights["linear of layers"] * NF4_BITS / 8) - 2 * weights["largest linear"]


def sharded(own: dict, weights: dict[str, int], processes: int) -> int:
    """Bytes per process under FSDP2: its share of all that stays, what is whole at a time, and the activations.

    Whole in float32: the root's own weights and the head (kept until the backward pass), the greater of the embeddings
    and two layers (one at work, one on its way), and two layers' gradients. The activations have the head's and the
    embeddings' gradients. Not all of it is there at one moment, so this is more than the peak.
    """
    stays = sum(own["at_peak"].get(kind, 0) for kind in ("weights", "average", "optimizer")) + own["gradients"]
    at_work = max(weights["embeddings"], 2 * weights["one layer"])
    whole = 4 * (weights["root of FSDP"] + weights["head"] + at_work + 2 * weights["one layer"])
    return stays // processes + whole + own["most_activations"]


def card_for(peak: int) -> str:
    """The smallest card, in GB (2^30 bytes), that has room for a peak and the reserve."""
    needed = peak * (1 + RESERVE_SHARE) + RESERVE_BYTES
    return next((str(card) for card in CARDS if needed <= card * 2**30), "none")


def count_all(config: NextFlowConfig, sizes: list[int], prompt_length: int) -> tuple[list[dict], list[dict], dict]:
    """Rows of drawing, rows of training, and the numbers of weights."""
    weights = layer_weights(build(config, torch.bfloat16, "full", counted=True))
    drawing, training = [], []

    def add(rows: list, way: str, size: int, run: bool, peak: int, **more) -> None:
        rows.append({"way": way, "size": size, "peak": peak, "card": card_for(peak), "run on shapes": run, **more})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    for size in sizes:
        sequence = {"size": size, "rows": 1, "prompt_length": prompt_length}
        grids = config.schedule.grids_for_size(size, size)
        slots = 2 * max(prompt_length + 1, grids[-1][0] * grids[-1][1])
        own = count(config, torch.bfloat16, "draw", False, **sequence)
        peak = own["peak"]
        add(drawing, "bfloat16", size, True, **own)
        for bits in (8, 4):
            add(drawing, f"{bits}-bit", size, False, peak - quantised(weights, bits, slots))
        on_cpu = 2 * (weights["decoder layers"] - weights["one layer"])
        add(drawing, "bfloat16, layers on the CPU", size, False, peak - on_cpu, cpu=2 * weights["decoder layers"])
        for checkpointing in (False, True):
            more = {"checkpointing": checkpointing}
            own = count(config, torch.float32, "full", checkpointing, **sequence)
            add(training, "full, float32", size, True, **more, **own)
            for processes in (2, 4, 8) if checkpointing else ():
                peak = sharded(own, weights, processes)
                add(training, f"full, float32, FSDP2 over {processes}", size, False, peak, **more)
            own = count(config, torch.bfloat16, "full", checkpointing, **sequence)
            add(training, "full, bfloat16", size, True, **more, **own)
            saved = int((4 - ADAM_8BIT_BYTES) * (weights["trained"] - weights["embeddings"]))
            # Embeddings keep float32 moments, where torch's are bfloat16 like the weights.
            saved -= 4 * weights["embeddings"]
            add(training, "full, bfloat16, 8-bit Adam", size, False, own["peak"] - saved, **more)
            own = count(config, torch.bfloat16, "align", checkpointing, **sequence)
            add(training, "connector and head, bfloat16", size, True, **more, **own)
            own = count(config, torch.bfloat16, "lora", checkpointing, **sequence)
            add(training, "LoRA, bfloat16", size, True, **more, **own)
            peak = own["peak"] - quantised(weights, 4, 0)
            add(training, "LoRA, 4-bit", size, False, peak, **more)
    return drawing, training, weights


# ---- the check -----------------------------------------------------------------------------------------------------

# Way, type of the weights, checkpointing, pictures at once, side in pixels.
CHECKS = {
    "full": ("full", "float32", False, 2, 128),
    "full, checkpointing": ("full", "float32", True, 4, 128),
    "connector and head": ("align", "bfloat16", False, 2, 128),
    "LoRA": ("lora", "bfloat16", False, 2, 128),
    "LoRA, checkpointing": ("lora", "bfloat16", True, 8, 128),
    "drawing 4 pictures": ("draw", "bfloat16", False, 4, 128),
    "drawing 16 pictures": ("draw", "bfloat16", False, 16, 128),
}


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(name: str, prompt_length: int) -> int:
    """Greatest resident memory of one way, over what the process has after a small run of the same."""
    way, dtype, checkpointing, rows, size = CHECKS[name]

    def run(config, rows, size):
        model = build(config, getattr(torch, dtype), way, counted=False)
        if way == "draw":
            draw(model, size, rows, prompt_length)
        else:
            train(model, one_sequence(config, size, rows, prompt_length), checkpointing)

    run(NextFlowConfig.from_preset("nextflow-mini"), 1, 32)
    before = resident_bytes()
    run(small_config(), rows, size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def check(prompt_length: int) -> list[dict]:
    """Counted and measured bytes of every way in `CHECKS`."""
    found = []
    for name, (way, dtype, checkpointing, rows, size) in CHECKS.items():
        # Freed tensors go back to the system at once, as they leave the account.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--measure", name, "--prompt-length", str(prompt_length)]
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        measured = int(out.splitlines()[-1])
        sequence = {"size": size, "rows": rows, "prompt_length": prompt_length}
        own = count(small_config(), getattr(torch, dtype), way, checkpointing, **sequence)
        kept = sum(own["at_peak"].get(kind, 0) for kind in ("weights", "average", "optimizer"))
        found.append(
            {
                "way": name,
                "setting": {"weights": dtype, "checkpointing": checkpointing, **sequence},
                "counted": own["peak"],
                "measured": measured,
                "ratio": round(own["peak"] / measured, 3),
                "ratio beyond what is kept": round((own["peak"] - kept) / (measured - kept), 3),
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def by_size(rows: list[dict], sizes: list[int]) -> list[list[str]]:
    """A line for every way: GiB at the peak and the card, size by size."""
    lines: dict[tuple, list[str]] = {}
    for own in rows:
        key = (own["way"] + (", counted by a rule" if not own["run on shapes"] else ""), own.get("checkpointing"))
        lines.setdefault(key, []).append(f"{gib(own['peak'])} ({own['card']})")
    named = {None: [], False: ["no"], True: ["yes"]}
    return [[way, *named[checkpointing], *cells] for (way, checkpointing), cells in lines.items()]


def report(drawing: list[dict], training: list[dict], checks: list[dict], sizes: list[int]) -> None:
    """Print the markdown tables."""
    columns = [f"{size} px" for size in sizes]
    print(table(["drawing, GiB (card)", *columns], by_size(drawing, sizes)), end="\n\n")
    print(table(["training, GiB (card)", "checkpointing", *columns], by_size(training, sizes)), end="\n\n")
    kinds = ("weights", "average", "optimizer")
    parts: dict[tuple, list[str]] = {}
    for own in training:
        if own["run on shapes"]:
            at_peak = [gib(own["at_peak"].get(kind, 0)) for kind in kinds]
            line = parts.setdefault((own["way"], own["checkpointing"]), [*at_peak, gib(own["gradients"])])
            line.append(gib(own["saved for backward"]))
    lines = [[way, "yes" if checkpointing else "no", *cells] for (way, checkpointing), cells in parts.items()]
    header = ["parts, GiB", "checkpointing", *kinds, "gradients", *(f"kept for backward, {own}" for own in columns)]
    print(table(header, lines), end="\n\n")
    print_checks(checks)


def print_checks(checks: list[dict]) -> None:
    header = ["way", "counted MiB", "measured MiB", "ratio", "beyond what is kept"]
    rows = [
        [own["way"], own["counted"] >> 20, own["measured"] >> 20, own["ratio"], own["ratio beyond what is kept"]]
        for own in checks
    ]
    print(table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="sides of the square pictures")
    parser.add_argument("--prompt-length", type=int, default=PROMPT_LENGTH, help="text tokens before <boi>")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="only compare counts with measured peaks")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_7b.json", help="where the JSON goes")
    parser.add_argument("--measure", choices=CHECKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(measure(args.measure, args.prompt_length))
        return
    checks = check(args.prompt_length)
    if args.check:
        print_checks(checks)
        return
    config = NextFlowConfig.from_preset("nextflow-7b")
    drawing, training, weights = count_all(config, args.sizes, args.prompt_length)
    slots = {size: sum(h * w for h, w in config.schedule.grids_for_size(size, size)) for size in args.sizes}
    loss = {
        str(dtype).removeprefix("torch."): {size: count_loss(config, dtype, rows) for size, rows in slots.items()}
        for dtype in (torch.float32, torch.bfloat16)
    }
    write_json(
        args.output,
        {
            "what": "nextflow-7b: bytes at the peak of each way of loading and training, and the smallest card in GB",
            **record(args.threads),
            "prompt_length": args.prompt_length,
            "reserve": {"share": RESERVE_SHARE, "bytes": RESERVE_BYTES},
            "weights": weights,
            "drawing": drawing,
            "training": training,
            "loss_bytes": loss,
            "checks": checks,
        },
    )
    report(drawing, training, checks, args.sizes)


if __name__ == "__main__":
    main()
