"""GRPO for next-scale pictures on TRL's trainer (NextFlow section 3.2.5, VAR-RL).

A completion is the codes of one picture. What differs from TRL's trainer, and why:

* rollouts are drawn by `generate(generation_mode="image")`, through TRL's `rollout_func`;
* log-probabilities are those of the codes, from one teacher-forced pass (TRL's go through the text head);
* advantages are one number per code, for the scale weights k_t and the regions that a reward looked at;
* rewards of several completions of one prefix become its value (VMR);
* a reward that fails ends the run, or leaves its pictures out, as configured.
"""

import concurrent.futures
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import accumulate

import torch
from torch import nn
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from ..modeling.scale_schedule import Grid

ON_REWARD_ERROR = ("raise", "skip")
# Boxes of a picture that a reward looked at: (top, left, bottom, right) in pixels; `None` is the whole picture.
Boxes = list[tuple[float, float, float, float]] | None


class RewardError(RuntimeError):
    """A reward function raised, took too long, or returned something that is no number."""


@dataclass
class NextFlowGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` with what next-scale pictures need. `temperature`, `top_k` and `top_p` govern the codes.

    Args:
        image_size: (height, width) in pixels of what is drawn; the checkpoint's first size by default.
        prefix_scales: Train the first m scales alone (prefix tuning, NextFlow section 3.2.5); all by default.
        suffix_temperature: Temperature of the scales that are drawn without being trained; as the others by default.
        guidance_scale: Classifier-free guidance in rollouts. The paper trains without.
        scale_weight_alpha: Weights k_t = 1 / (h w)^alpha of the scales (VAR-RL Eq 9), normalised to a mean of 1 over
            the trained codes. 0 weighs all codes alike.
        vmr_completions: Completions K of each prefix whose rewards make its value, V = eta log mean exp(R / eta)
            (VAR-RL Eq 10); needs `prefix_scales`. 1 takes the reward of the only one.
        vmr_eta: The eta of it.
        suffix_every: With VMR, every how many-th update trains the other scales, on completions of a shared prefix
            (4 in VAR-RL: three prefix updates, then one suffix update). 0 never does.
        on_reward_error: What a reward function that raises, takes too long or returns NaN does: "raise" ends the run
            and names the prompts; "skip" leaves the pictures that it could not score out of the update.
        reward_timeout: Seconds a reward function may take for a batch; no limit by default.
    """

    image_size: list[int] | None = field(default=None)
    prefix_scales: int | None = field(default=None)
    suffix_temperature: float | None = field(default=None)
    guidance_scale: float = field(default=0.0)
    scale_weight_alpha: float = field(default=0.7)
    vmr_completions: int = field(default=1)
    vmr_eta: float = field(default=1.0)
    suffix_every: int = field(default=4)
    on_reward_error: str = field(default="raise")
    reward_timeout: float | None = field(default=None)

    def __post_init__(self):
        if self.bf16 is None and not torch.cuda.is_available():
            # TRL's default would train in bfloat16 wherever it runs.
            self.bf16 = False
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(
                f"`temperature` must be above 0: what has no chance cannot be learned. Got {self.temperature}."
            )
        if self.vmr_completions < 1 or self.vmr_eta <= 0:
            raise ValueError(
                f"Need vmr_completions >= 1 and vmr_eta > 0, got {self.vmr_completions} and {self.vmr_eta}."
            )
        if self.vmr_completions > 1 and self.prefix_scales is None:
            raise ValueError("`vmr_completions` are completions of a prefix; set `prefix_scales`.")
        if self.on_reward_error not in ON_REWARD_ERROR:
            raise ValueError(f"`on_reward_error` must be one of {ON_REWARD_ERROR}, got {self.on_reward_error!r}.")
        if self.use_vllm:
            raise ValueError("vLLM does not draw next-scale pictures; leave `use_vllm` out.")
        if self.mask_truncated_completions:
            raise ValueError("A picture is never truncated; leave `mask_truncated_completions` out.")


class NextFlowGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` for pictures: change the class name, give reward functions that look at `drawn`.

    Datasets, reward functions, logging, PEFT and checkpoints are TRL's. A reward function is called with `prompts`,
    `drawn` (PIL pictures, one per prompt) and the dataset's columns. Prompts are conversations, or texts (then of the
    user's turn); where the dataset has an `images` column, its pictures stand before the text (editing); all of one
    size.

    Args:
        model: A `NextFlowForConditionalGeneration` or a path.
        reward_funcs: TRL's reward functions.
        args: [`NextFlowGRPOConfig`].
        processing_class: The checkpoint's processor.
        region_func: Called with `prompts` and `drawn`; says which parts of each picture its reward depends on, as
            [`Boxes`]. Other codes are not trained (mask propagation, VAR-RL section 3.5): a code is kept where a cell
            of the finest grid within it touches a box.
        kwargs: Other arguments of TRL's trainer.

    Raises:
        ValueError: If the settings do not fit the model's scales.
    """

    def __init__(
        self,
        model,
        reward_funcs,
        args: NextFlowGRPOConfig,
        processing_class=None,
        region_func: Callable[..., list[Boxes]] | None = None,
        **kwargs,
    ):
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        funcs = [guarded(own, args.on_reward_error, args.reward_timeout) for own in funcs]
        with warnings.catch_warnings():
            # TRL says that rollout functions are experimental; that is ours to follow, not our users'.
            warnings.filterwarnings("ignore", message=".*rollout_func.*")
            super().__init__(
                model, funcs, args=args, processing_class=processing_class, rollout_func=_roll_out, **kwargs
            )
        config = self._own_model().config
        size = args.image_size or (config.trained_image_sizes or [[min(config.schedule.resolutions)] * 2])[0]
        self.grids: tuple[Grid, ...] = config.schedule.grids_for_size(*size)
        self.image_size = tuple(size)
        self.prefix_scales = len(self.grids) if args.prefix_scales is None else args.prefix_scales
        if not 1 <= self.prefix_scales <= len(self.grids):
            raise ValueError(
                f"`prefix_scales` must be 1 to {len(self.grids)}, the scales of {size[0]}x{size[1]}; got "
                f"{args.prefix_scales}."
            )
        self.region_func = region_func
        # What the rollouts of the batch at hand left for rewards and advantages.
        self._completions: list[list] = []
        self._regions: torch.Tensor | None = None

    def _own_model(self):
        """The model itself, without what accelerate and PEFT put around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _set_signature_columns_if_needed(self):
        # All columns go to reward functions.
        if self._signature_columns is None:
            self._signature_columns = list(self.train_dataset.column_names)

    # ---- rollouts ----------------------------------------------------------------------------------------------------

    @property
    def trains_suffix(self) -> bool:
        """Whether the update at hand trains the scales behind the prefix (VAR-RL: three prefix updates, then one)."""
        every = self.args.suffix_every if self.args.vmr_completions > 1 else 0
        return bool(every) and self.model.training and self.state.global_step % every == every - 1

    def roll_out(self, prompts: list) -> dict:
        """Draw a picture per prompt.

        Returns:
            What TRL asks of a rollout: ids of prompts and codes (as entries of the vocabulary), `env_mask` (which codes
            are trained), and `drawn` for the reward functions.
        """
        args, group = self.args, self.num_generations if self.model.training else self.num_generations_eval
        conversations = [[{"role": "user", "content": own}] if isinstance(own, str) else own for own in prompts]
        inputs = self.processing_class.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        ).to(self.accelerator.device)
        counts = [height * width for height, width in self.grids]
        prefix, scales = sum(counts[: self.prefix_scales]), len(self.grids)
        suffix_temperature = args.temperature if args.suffix_temperature is None else args.suffix_temperature
        trained = scales if self.trains_suffix else self.prefix_scales
        settings = {
            **inputs,
            "generation_mode": "image",
            "image_size": self.image_size,
            "guidance_scale": args.guidance_scale,
            "temperature": [args.temperature if scale < trained else suffix_temperature for scale in range(scales)],
            "top_k": args.top_k,
            "top_p": args.top_p,
        }
        with self._generating() as model:
            output = model.generate(**settings, seed=self._seeds(len(prompts), 0))
            codes = torch.stack(output.codes)
            if self.trains_suffix:
                # The completions of a group share the prefix of its first.
                shared = codes[:, :prefix].unflatten(0, (-1, group))[:, :1].expand(-1, group, -1).flatten(0, 1)
                output = model.generate(**settings, prefix_codes=shared, seed=self._seeds(len(prompts), 1))
                codes = torch.stack(output.codes)
            completions = [output.images]
            for turn in range(1, 1 if self.trains_suffix else args.vmr_completions):
                again = model.generate(**settings, prefix_codes=codes[:, :prefix], seed=self._seeds(len(prompts), turn))
                completions.append(again.images)
        self._completions = [
            self.processing_class.post_process_multimodal_output(torch.stack(own), generation_mode="image")
            for own in completions
        ]
        mask = [1] * prefix
        if self.trains_suffix:
            mask = [0] * prefix + [1] * (codes.shape[1] - prefix)
        codes = codes[:, : len(mask)]
        self._regions = None
        if self.region_func is not None:
            boxes = self.region_func(prompts=prompts, drawn=self._completions[0])
            self._regions = torch.stack([region_mask(own, self.grids, self.image_size) for own in boxes])
            self._regions = self._regions[:, : len(mask)].to(codes.device)
        kept = inputs["attention_mask"].bool()
        return {
            "prompt_ids": [ids[own].tolist() for ids, own in zip(inputs["input_ids"], kept)],
            "completion_ids": (codes + self._own_model().config.code_start_id).tolist(),
            "logprobs": None,
            "env_mask": [mask] * len(prompts),
            "drawn": self._completions[0],
        }

    def _generating(self):
        return unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
        )

    def _seeds(self, number: int, turn: int) -> list[int]:
        """Seeds of the pictures of this step, from the run's seed alone: a resumed run draws what it would have."""
        process = self.accelerator.process_index + self.accelerator.num_processes * (
            turn + 8 * int(self.model.training)
        )
        first = (self.args.seed * 1_000_003 + self.state.global_step) * 4096 + process
        return [first * 65_536 + row for row in range(number)]

    # ---- log-probabilities -------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        pixel_values=None,
        num_images=None,
        **unused,
    ):
        """Log-probabilities and entropies of the codes: `(batch, codes)` each, by one teacher-forced pass."""
        config = self._own_model().config
        num_codes = list(accumulate(height * width for height, width in self.grids))
        if logits_to_keep not in num_codes:
            raise ValueError(
                f"A completion has {logits_to_keep} codes, but scales end at {num_codes}; leave `pad_to_multiple_of` "
                "out."
            )
        log_probs, entropies = [], []
        for first in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(first, first + (batch_size or len(input_ids)))
            ids = input_ids[rows]
            codes = ids[:, -logits_to_keep:] - config.code_start_id
            # The codes' slots: <boi> predicts the first scale, a placeholder each of the others.
            slots = torch.full_like(codes, config.image_token_id)
            slots[:, 0] = config.boi_token_id
            pictures, grids, is_drawn = self._pictures(codes, pixel_values, num_images, rows)
            scored = torch.where(is_drawn[:, None], pictures, -100)
            with self.accelerator.autocast():
                output = model(
                    input_ids=torch.cat([ids[:, :-logits_to_keep], slots], dim=1),
                    attention_mask=attention_mask[rows],
                    image_codes=pictures,
                    image_grids=grids,
                    scored_codes=scored.masked_fill(pictures < 0, -100),
                    score_temperature=self.args.temperature,
                )
            log_probs.append(output.code_log_probs.view(codes.shape))
            entropies.append(output.code_entropies.view(codes.shape))
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    def _pictures(self, codes, pixel_values, num_images, rows: slice) -> tuple[torch.Tensor, ...]:
        """Codes and grids of all images of the rows in order, the drawn one last in each, and which are drawn."""
        drawn_grids = torch.tensor(self.grids)
        counts = [0] * len(codes) if num_images is None else num_images[rows]
        if pixel_values is None or not sum(counts):
            return codes, drawn_grids.expand(len(codes), -1, -1), torch.ones(len(codes), dtype=torch.bool)
        first = sum(num_images[: rows.start])
        own = pixel_values[first : first + sum(counts)].to(codes.device)
        context, grids = self._own_model().model.encode_images(own)
        context, all_codes, all_grids, is_drawn = iter(zip(context, grids)), [], [], []
        for row, count in enumerate(counts):
            for _ in range(count):
                seen, seen_grids = next(context)
                all_codes.append(seen)
                all_grids.append(torch.tensor(seen_grids))
                is_drawn.append(False)
            all_codes.append(codes[row])
            all_grids.append(drawn_grids)
            is_drawn.append(True)
        return (
            nn.utils.rnn.pad_sequence(all_codes, batch_first=True, padding_value=-1),
            nn.utils.rnn.pad_sequence(all_grids, batch_first=True),
            torch.tensor(is_drawn, device=codes.device),
        )

    # ---- rewards and advantages --------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Rewards of each picture; of several completions of a prefix, its value by each reward function."""
        rewards = []
        for drawn in self._completions:
            for own, picture in zip(inputs, drawn):
                own["drawn"] = picture
            rewards.append(super()._calculate_rewards(inputs, prompts, completions, completion_ids_list))
        return rewards[0] if len(rewards) == 1 else middle_return(torch.stack(rewards), self.args.vmr_eta)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        weights = scale_weights(self.grids, self.args.scale_weight_alpha, output["tool_mask"][0].bool())
        advantages = output["advantages"][:, None] * weights.to(output["advantages"])
        output["advantages"] = advantages if self._regions is None else advantages * self._regions
        return output


def _roll_out(prompts: list, trainer: NextFlowGRPOTrainer) -> dict:
    return trainer.roll_out(prompts)


def scale_weights(grids: Sequence[Grid], alpha: float, trained: torch.Tensor) -> torch.Tensor:
    """Weight k_t = 1 / (h w)^alpha of each code, with a mean of 1 over the trained ones (VAR-RL Eq 9).

    Args:
        grids: Scales of the picture.
        alpha: 0 weighs all codes alike.
        trained: bool `(codes,)`; a prefix of the picture's codes.
    """
    areas = torch.tensor([float(height * width) for height, width in grids])
    weights = (areas**-alpha).repeat_interleave(areas.long())[: len(trained)].to(trained.device)
    return weights / weights[trained].mean()


def middle_return(rewards: torch.Tensor, eta: float) -> torch.Tensor:
    """Value of a prefix from the rewards of its completions: eta log mean exp(R / eta) (VAR-RL Eq 10).

    Args:
        rewards: `(completions, ...)`; NaN where there is none, which is left out.
        eta: Large: their mean; small: their largest.
    """
    scored = ~rewards.isnan()
    logits = torch.where(scored, rewards / eta, -math.inf)
    values = eta * (logits.logsumexp(dim=0) - scored.sum(dim=0).log())
    return torch.where(scored.any(dim=0), values, math.nan)


def region_mask(boxes: Boxes, grids: Sequence[Grid], image_size: tuple[int, int]) -> torch.Tensor:
    """Which codes boxes reach: float `(codes,)` of 0 and 1, from the finest scale to the coarsest.

    A cell of the finest grid counts where a box touches it, one of a coarser grid where a finer one within it does.
    """
    if boxes is None:
        return torch.ones(sum(height * width for height, width in grids))
    (rows, columns), (height, width) = grids[-1], image_size
    finest = torch.zeros(1, 1, rows, columns)
    for top, left, bottom, right in boxes:
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(
                f"A box is (top, left, bottom, right) within {height}x{width} pixels, got {(top, left, bottom, right)}."
            )
        first_row, last_row = int(top * rows / height), math.ceil(bottom * rows / height)
        first_column, last_column = int(left * columns / width), math.ceil(right * columns / width)
        finest[..., first_row:last_row, first_column:last_column] = 1
    masks = [nn.functional.adaptive_max_pool2d(finest, own).flatten() for own in grids]
    return torch.cat(masks)


# ---- rewards that fail -----------------------------------------------------------------------------------------------


def guarded(reward_func, on_error: str = "raise", timeout: float | None = None):
    """A reward function whose failures are errors by name, or leave its pictures out.

    Models, paths and asynchronous functions are returned as they are.

    Args:
        reward_func: TRL's reward function.
        on_error: "raise", or "skip": `None` for what could not be scored, which TRL leaves out of its advantages.
        timeout: Seconds for a batch.
    """
    if isinstance(reward_func, (str, nn.Module)) or inspect.iscoroutinefunction(reward_func):
        return reward_func
    name = getattr(reward_func, "__name__", type(reward_func).__name__)

    @wraps(reward_func, updated=())
    def checked(prompts, **columns):
        ids = columns.get("id") or prompts
        try:
            rewards = _within(timeout, reward_func, prompts=prompts, **columns)
        except Exception as error:
            if on_error == "raise":
                raise RewardError(f"The reward {name!r} failed for the prompts {_short(ids)}: {error!r}") from error
            return [None] * len(prompts)
        bad = [place for place, own in enumerate(rewards) if own is not None and not math.isfinite(own)]
        if bad and on_error == "raise":
            found = [rewards[place] for place in bad]
            raise RewardError(f"The reward {name!r} is {found} for the prompts {_short([ids[own] for own in bad])}.")
        return [None if place in bad else own for place, own in enumerate(rewards)]

    checked.__name__ = name
    return checked


def _within(timeout: float | None, function: Callable, **kwargs):
    if timeout is None:
        return function(**kwargs)
    # A thread that hangs cannot be ended; it is left behind.
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    try:
        return pool.submit(function, **kwargs).result(timeout)
    except concurrent.futures.TimeoutError as error:
        raise TimeoutError(f"no answer within {timeout} s") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _short(ids: list, most: int = 8) -> str:
    told = [str(own) for own in dict.fromkeys(map(str, ids))]
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")
