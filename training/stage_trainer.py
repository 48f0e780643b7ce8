"""What every stage shares: transformers' `Trainer`, an average of the weights, resumption, whole files."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .coded_documents import MixedSequences
from .compilation import compile_layers, has_decoder, take_compilation
from .packing import PackedSequences
from .processes import all_processes
from .recipe import Recipe, note_recipe
from .sharding import gathered, is_sharded, make_whole, own_part, part_of
from .zero import check_zero, zero_arguments

logger = logging.getLogger(__name__)

_EMA_FILE = "ema.safetensors"


class EmaCallback(TrainerCallback):
    """Exponential moving average of the trained weights, saved beside every checkpoint.

    An average of weights in bfloat16 is in bfloat16, too: a step moves it by less than it can tell apart, and so moves
    it by chance, as often as is right on average.

    Args:
        decay: Share of the average that a step keeps. Early steps keep less: min(decay, (1 + n) / (10 + n)).
        resume_from: Checkpoint folder whose average is taken up, if there is one.
    """

    def __init__(self, decay: float, resume_from: str | None):
        self.decay = decay
        self.resume_from = resume_from
        self.average: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: own_part(p).detach().clone() for name, p in trained.items()}
        saved = Path(self.resume_from or "") / _EMA_FILE
        if self.resume_from and saved.is_file():
            # By name: a file does not keep the order in which the weights are averaged.
            average = load_file(saved)
            self.average = {name: part_of(average[name], p) for name, p in trained.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        generator = None
        fine, own = [], []
        for average, parameter in zip(self.average.values(), (p for p in model.parameters() if p.requires_grad)):
            if average.dtype != torch.bfloat16:
                fine.append(average)
                own.append(own_part(parameter))
                continue
            if generator is None:
                generator = torch.Generator(average.device).manual_seed(state.global_step)
            exact = average.float().lerp_(own_part(parameter).float(), 1 - decay)
            average.copy_(round_by_chance(exact, generator))
        if fine:
            torch._foreach_lerp_(fine, own, 1 - decay)

    def on_save(self, args, state, control, model=None, **kwargs):
        # Sharded weights are gathered from all processes, and written by one, when all have written what they hold:
        # a checkpoint with this file is whole.
        parameters = dict(model.named_parameters())
        average = {name: gathered(own, parameters[name]).contiguous() for name, own in self.average.items()}
        all_processes().wait_for_everyone()
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_file(average, folder / f"{_EMA_FILE}.tmp")
            os.replace(folder / f"{_EMA_FILE}.tmp", folder / _EMA_FILE)

    @torch.no_grad()
    def copy_to(self, model: PreTrainedModel) -> None:
        """Put the average in place of the weights."""
        for name, parameter in model.named_parameters():
            if name in self.average:
                own_part(parameter).copy_(self.average[name])


def round_by_chance(exact: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 to bfloat16, up or down with the chance that makes the mean exact (stochastic rounding)."""
    bits = exact.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class FiniteCallback(TrainerCallback):
    """Stops the run before a step with a gradient that is not finite can spoil the weights."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:
            # Gradients of scaled losses may overflow: the scaler leaves such steps out, and scales by less.
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = gathered(norm, norm)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"The gradient of step {state.global_step + 1} has the norm {norm.item()}")


class PictureCallback(TrainerCallback):
    """A callback whose pictures go where the numbers of its run go: to TensorBoard, W&B and trackio.

    Attributes:
        reporters: The run's callbacks; `run_stage` sets them.
    """

    reporters: Sequence[TrainerCallback] = ()

    def report(self, name: str, picture: np.ndarray, step: int) -> None:
        """Hand out an uint8 picture `(height, width, 3)`."""
        for reporter in self.reporters:
            if isinstance(reporter, TensorBoardCallback) and reporter.tb_writer is not None:
                reporter.tb_writer.add_image(name, picture, step, dataformats="HWC")
            elif isinstance(reporter, WandbCallback):
                import wandb

                if wandb.run is not None:
                    wandb.log({name: wandb.Image(picture), "train/global_step": step})
            elif isinstance(reporter, TrackioCallback):
                import trackio

                trackio.log({name: trackio.Image(picture), "train/global_step": step})


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite."""


def report_nonfinite(folder: Path, error: NonFiniteError, step: int, ids: list[str]) -> NonFiniteError:
    """The error to raise, once the ids of the step's records are in `nonfinite.json`."""
    # Whichever process meets it first; the others end with it.
    (folder / "nonfinite.json").write_text(json.dumps({"error": str(error), "step": step, "ids": ids}) + "\n")
    return NonFiniteError(
        f"{error}. The ids of its records are in {folder / 'nonfinite.json'}; the last checkpoint is good."
    )


class StageTrainer(Trainer):
    """`Trainer` that logs the mean of every loss term a model's output carries, and stops where one is not finite.

    The ids of the records of the step in which that happens are written to `nonfinite.json` in the output folder.

    Args:
        loss_function: `(model, batch)` -> output with `.loss`; other `*_loss` entries are logged.
    """

    def __init__(self, *args, loss_function: Callable, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_function = loss_function
        self.terms: dict[str, list[torch.Tensor]] = {}
        # Every stage's loss is a mean over its own batch.
        self.model_accepts_loss_kwargs = False
        self.ids_of_step: tuple[int, list[str]] = (0, [])

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, PackedSequences):
            return super().get_train_dataloader()
        # Its rows are this process' own; accelerate would leave most of them out, as it takes them for everyone's.
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        step = self.state.global_step + 1
        before = self.ids_of_step[1] if self.ids_of_step[0] == step else []
        self.ids_of_step = (step, before + inputs.pop("ids", []))
        output = self.loss_function(model, inputs)
        if not torch.isfinite(output.loss):
            raise NonFiniteError(f"The loss of step {step} is {output.loss.item()}")
        for name, value in output.items():
            if name.endswith("_loss") and torch.is_tensor(value):
                self.terms.setdefault(name, []).append(value.detach())
            elif name.endswith("_per_scale") and torch.is_tensor(value):
                for scale, own in enumerate(value.detach().unbind()):
                    self.terms.setdefault(f"scale_{scale + 1}_loss", []).append(own)
        return (output.loss, output) if return_outputs else output.loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            # DeepSpeed steps within the backward pass, and keeps no gradients; where their norm is not finite, it
            # leaves the weights as they are.
            norm = self.deepspeed.get_global_grad_norm()
            if norm is not None and not 0 <= norm < math.inf:
                raise NonFiniteError(f"The gradient of step {self.state.global_step + 1} has the norm {norm}")
        return loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            means = {name: torch.stack(values).nanmean().item() for name, values in self.terms.items()}
            logs = {**logs, **{name: round(value, 5) for name, value in means.items() if value == value}}
            self.terms = {}
        super().log(logs, *args, **kwargs)


def run_stage(
    recipe: Recipe,
    model: PreTrainedModel,
    dataset: torch.utils.data.Dataset,
    collate: Callable,
    loss_function: Callable,
    callbacks: list[TrainerCallback] = (),
) -> PreTrainedModel:
    """Train `model`, resuming from the newest checkpoint in the recipe's folder, and return it with averaged weights.

    Where that is a run of another recipe, or there is nothing left to train, a warning says so.

    Raises:
        ValueError: If the folder cannot be written, or has no room for the checkpoints; if there is no such DeepSpeed
            configuration, no launcher has started the process, or the weights could not be averaged.
        ImportError: If the recipe asks for DeepSpeed, and it is not installed.
        NonFiniteError: If a loss or gradient is NaN or infinite; the ids of the step's records are then in
            `nonfinite.json`, and the weights of the last checkpoint are good.
    """
    folder = Path(recipe.output_dir)
    # Two checkpoints are kept while the next is written, each with the average and Adam's two moments.
    check_writable(folder, bytes_needed=3 * checkpoint_bytes(model, copies=3))
    arguments = {
        "seed": 0,
        "remove_unused_columns": False,
        "report_to": [],
        # While a checkpoint is being written, the one before it must be there.
        "save_total_limit": 2,
        "logging_steps": 50,
        "disable_tqdm": False,
        "use_cpu": not torch.accelerator.is_available(),
        # Every rank reads a stream itself and takes its turns: rows of unequal length cannot be cut from one batch.
        "accelerator_config": {"dispatch_batches": False},
        # A rank may run a model more often in a step than another: once for each size of its pictures.
        "ddp_broadcast_buffers": False,
        # They have an order of their own, in which every document is read once before one comes again.
        "train_sampling_strategy": "sequential" if isinstance(dataset, MixedSequences) else "random",
        **zero_arguments(recipe.trainer),
    }
    # Of a model without a decoder the Trainer compiles all.
    compilation = take_compilation(arguments) if has_decoder(model) else None
    if compilation is not None:
        # Where `TrainingArguments` of a stage before have left what they asked accelerate for.
        for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
            os.environ.pop(name, None)
    last = last_checkpoint(folder)
    if "fsdp_size" in recipe.stage_args:
        if "deepspeed" in arguments:
            raise ValueError("A run is sharded by `fsdp_size` or by `deepspeed`, not by both.")
        # Of a model that was sharded on loading, transformers saves no optimizer.
        arguments["save_only_model"] = True
        if last is not None:
            raise ValueError(
                f"A run with `fsdp_size` cannot be resumed from {last}. Name it as `init_from.decoder` of a run in "
                "another folder, or shard by accelerate's FSDP or DeepSpeed, which resume."
            )
    args = TrainingArguments(output_dir=str(folder), **arguments)
    if args.should_save:
        note_recipe(recipe)
    set_seed(args.seed)
    leave_out_cudnn_attention()
    if compilation is not None or args.torch_compile:
        # How often a function may be compiled anew counts for all stages of a process.
        torch.compiler.reset()
    if compilation is not None:
        compile_layers(model, **compilation)
    ema = EmaCallback(recipe.stage_args.get("ema_decay", 0.999), last)
    trainer = StageTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collate,
        loss_function=loss_function,
        callbacks=[ema, FiniteCallback(), *callbacks],
    )
    for callback in callbacks:
        if isinstance(callback, PictureCallback):
            callback.reporters = trainer.callback_handler.callbacks
    if trainer.is_deepspeed_enabled:
        check_zero(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
    if last is not None and _step_of(last) >= args.max_steps > 0:
        # Killed between its last checkpoint and its result: the weights are there.
        logger.warning("%s has all of max_steps=%d: nothing is trained.", last, args.max_steps)
        if not trainer.is_fsdp_enabled:
            # Sharded ones are for a model that is sharded; the average has all that was trained.
            trainer._load_from_checkpoint(last)
        ema.on_train_begin(args, trainer.state, trainer.control, model=model)
        shutil.copyfile(Path(last) / "trainer_state.json", folder / "trainer_state.json")
    else:
        try:
            trainer.train(resume_from_checkpoint=last)
        except NonFiniteError as error:
            raise report_nonfinite(folder, error, *trainer.ids_of_step) from error
        if args.should_save:
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
    ema.copy_to(model)
    if trainer.is_deepspeed_enabled:
        if trainer.deepspeed is not None:
            trainer.deepspeed.destroy()
        # Else the models of the stages that follow in this process would be loaded in parts.
        unset_hf_deepspeed_config()
    if is_sharded(model):
        make_whole(model)
    return model.eval()


def leave_out_cudnn_attention() -> None:
    """Of SDPA's kernels, cuDNN's gave a gradient of NaN on an H100 (torch 2.11), over rows that see nothing."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: the averaged weights are written last, so it has them."""
    whole = [path.parent for path in Path(folder).glob(f"checkpoint-*/{_EMA_FILE}")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None


def _step_of(checkpoint: str) -> int:
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]


def checkpoint_bytes(model: torch.nn.Module, copies: int) -> int:
    """A checkpoint's weights, and so many copies of what is trained, such as Adam's two moments."""
    weights, trained = (
        sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or frozen)
        for frozen in (True, False)
    )
    # Of an adapted model the adapter alone is saved.
    return (trained if isinstance(model, PeftModel) else weights) + copies * trained


def check_writable(folder: Path, bytes_needed: int = 0) -> None:
    """Raise `ValueError` unless so many bytes of checkpoints can lie in `folder`, before any work is done for it.

    Those of a run that goes on lie there already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"Cannot write to {folder}: {error}") from error
    free = shutil.disk_usage(folder).free
    bytes_needed -= sum(file.stat().st_size for file in folder.glob("checkpoint-*/**/*") if file.is_file())
    if free < bytes_needed:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB left, but the run's checkpoints need {bytes_needed / 1e9:.1f} GB more."
        )


def save_whole(folder: Path, save: Callable[[Path], None], sharded: bool = False) -> None:
    """Let `save` fill a folder under another name, then put it in place of `folder` at once.

    Of several processes the first does it, and the others wait; where weights are `sharded`, all of them call `save`,
    which gathers, and the first writes.
    """
    processes = all_processes()
    folder = Path(folder).resolve()
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if processes.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    processes.wait_for_everyone()
    if processes.is_main_process or sharded:
        save(unfinished)
    processes.wait_for_everyone()
    if processes.is_main_process:
        _put_in_place(unfinished, folder)
    processes.wait_for_everyone()


def _put_in_place(unfinished: Path, folder: Path) -> None:
    if folder.exists():
        outdated = folder.with_name(f"{folder.name}.outdated")
        shutil.rmtree(outdated, ignore_errors=True)
        os.replace(folder, outdated)
        os.replace(unfinished, folder)
        shutil.rmtree(outdated)
    else:
        os.replace(unfinished, folder)
