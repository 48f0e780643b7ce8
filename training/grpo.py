"""GRPO for next-scale pictures on TRL's trainer (NextFlow section 3.2.5, VAR-RL).

A completion is the codes of a picture, a text, or a thought and its picture. What differs from TRL's trainer, and why:

* rollouts are made by the model's own `generate`, through TRL's `rollout_func`;
* log-probabilities are those of codes among codes and of text among text, from one teacher-forced pass;
* advantages are one number per code, for the scale weights k_t and the regions that a reward looked at;
* rewards of several completions of one prefix become its value (VMR);
* a reward that fails ends the run, or leaves its pictures out, as configured.

Every method below that overrides TRL's says which of these it serves.
"""

import asyncio
import logging
import math
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_callable_name, is_async_callable

from ..files import write_whole
from ..modeling.scale_schedule import Grid

logger = logging.getLogger(__name__)

COMPLETIONS = ("picture", "answer", "thought")
ON_REWARD_ERROR = ("raise", "skip")
# Boxes of a picture that a reward looked at: (top, left, bottom, right) in pixels; `None` is the whole picture.
Boxes = list[tuple[float, float, float, float]] | None


class RewardError(RuntimeError):
    """A reward function raised, took too long, or returned something that is no number."""


@dataclass
class NextFlowGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` with what next-scale pictures need. `temperature`, `top_k` and `top_p` govern text and codes.

    Args:
        completion: What answers a prompt: a "picture"; a text ("answer", to questions about pictures); or a "thought"
            and the picture drawn after it, one trajectory. Text has `max_completion_length` tokens at most.
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

    completion: str = field(default="picture")
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
        if self.bf16 is None and (self.use_cpu or not torch.cuda.is_available()):
            # TRL's default would train in bfloat16 on CPUs too.
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
        if self.completion not in COMPLETIONS:
            raise ValueError(f"`completion` must be one of {COMPLETIONS}, got {self.completion!r}.")
        if self.vmr_completions > 1 and (self.prefix_scales is None or self.completion != "picture"):
            raise ValueError("`vmr_completions` complete the prefix of a picture; set `prefix_scales`.")
        if self.vmr_completions > 1 and (self.suffix_temperature == 0 or self.top_k == 1):
            raise ValueError(
                "All completions of a prefix would be the same: `vmr_completions` needs a `suffix_temperature` above 0 "
                "and `top_k` other than 1."
            )
        if self.suffix_every != 0 and self.suffix_every < 2:
            raise ValueError(f"`suffix_every` must be 0 or at least 2, got {self.suffix_every}.")
        if self.on_reward_error not in ON_REWARD_ERROR:
            raise ValueError(f"`on_reward_error` must be one of {ON_REWARD_ERROR}, got {self.on_reward_error!r}.")
        for name, (neutral, reason) in _REFUSED.items():
            if getattr(self, name) not in neutral:
                raise ValueError(f"`{name}` has no effect here: {reason}. Leave it out.")


# Settings of TRL that would be ignored in silence: values that ask for nothing, and why others are refused.
_REFUSED = {
    "use_vllm": ((False,), "vLLM does not draw next-scale pictures"),
    "use_transformers_continuous_batching": ((False,), "rollouts are made by the model's own `generate`"),
    "mask_truncated_completions": ((False,), "a picture is never truncated"),
    "min_p": ((None,), "codes are drawn by temperature, top-k and top-p"),
    "repetition_penalty": ((None, 1.0), "codes are drawn by temperature, top-k and top-p"),
    "generation_kwargs": ((None,), "rollouts take `image_size`, `guidance_scale`, `temperature`, `top_k`, `top_p`"),
    "cache_implementation": ((None,), "rollouts use the dynamic cache"),
    "pad_to_multiple_of": ((None,), "scales have fixed numbers of codes"),
}


# What a model card shows of a model that draws, and of one that answers.
_DRAWS = """\
import nextflow_hf  # registers with transformers
from transformers import pipeline

draw = pipeline("text-to-image", model="{model}")
draw("a red circle", seed=7).save("picture.png")
"""
_ANSWERS = """\
from nextflow_hf.inference import answer, load, user
from PIL import Image

model, processor = load("{model}")
print(answer(model, processor, [[user(Image.open("picture.png"), "describe the picture")]]))
"""


class NextFlowGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` for pictures: change the class name, give reward functions that look at `drawn`.

    Datasets, reward functions, logging, PEFT and checkpoints are TRL's. A reward function is called with `prompts`,
    `drawn` (PIL pictures, one per prompt; `None` for a thought that ended without one, and for answers),
    `completions` (what was said) and the dataset's columns. Prompts are conversations, or texts (then of the
    user's turn). Where the dataset has an `images` column they are conversations, and its pictures, all of one size,
    stand before the text (editing).

    Args:
        model: A `NextFlowForConditionalGeneration` or a path.
        reward_funcs: TRL's reward functions.
        args: [`NextFlowGRPOConfig`].
        processing_class: The checkpoint's processor.
        region_func: For pictures. Called with `prompts` and `drawn`; says which parts of each picture its reward
            depends on, as [`Boxes`]. Other codes get no advantage (mask propagation, VAR-RL section 3.5): a code keeps
            its own where a cell of the finest grid within it touches a box.
        kwargs: Other arguments of TRL's trainer.

    Raises:
        ValueError: If the settings do not fit the model's scales, each other, or what can be rewarded here.
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
        for name in ("tools", "environment_factory", "rollout_func"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` has no place here: a completion is one answer of the model's own `generate`."
                )
        dataset = kwargs.get("train_dataset")
        if "images" in (getattr(dataset, "column_names", None) or ()) and isinstance(
            next(iter(dataset))["prompt"], str
        ):
            raise ValueError(
                'Where a dataset has `images`, its prompts are conversations: [{"role": "user", "content": "..."}].'
            )
        if args.completion != "answer" and any(isinstance(own, (str, nn.Module)) for own in funcs):
            raise ValueError("A model that rewards text cannot see pictures; give a function that looks at `drawn`.")
        if args.completion != "picture" and region_func is not None:
            raise ValueError('`region_func` looks at pictures; it needs completion="picture".')
        funcs = [
            own if isinstance(own, (str, nn.Module)) else GuardedReward(own, args.on_reward_error, args.reward_timeout)
            for own in funcs
        ]
        with warnings.catch_warnings():
            # TRL says that rollout functions are experimental; that is ours to follow, not our users'.
            warnings.filterwarnings("ignore", message=".*rollout_func.*")
            super().__init__(
                model, funcs, args=args, processing_class=processing_class, rollout_func=_roll_out, **kwargs
            )
        if self.is_fsdp_enabled:
            raise ValueError("Rollouts under FSDP are not supported; spread GRPO by data parallelism, ZeRO-2 or LoRA.")
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
        if args.vmr_completions > 1 and self.prefix_scales == len(self.grids):
            raise ValueError(
                f"With `vmr_completions`, `prefix_scales` must leave scales to complete: below {len(self.grids)}."
            )
        rollout = args.per_device_train_batch_size * args.steps_per_generation
        if args.vmr_completions > 1 and args.suffix_every and rollout % self.num_generations:
            raise ValueError(
                f"In suffix updates the {self.num_generations} completions of a prompt share a prefix, so each process "
                f"must roll out whole groups; it rolls out {rollout} (batch size x `steps_per_generation`)."
            )
        self.region_func = region_func
        self._eval_rollouts = 0
        # Ids of the prompts that were answered last, or their places in the batch.
        self.rolled_out: list[str] = []
        # What the rollouts of the batch at hand left for rewards and advantages.
        self._completions: list[list] = []
        self._regions: torch.Tensor | None = None

    def _own_model(self):
        """The model itself, without what accelerate and PEFT put around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def create_model_card(self, *args, **kwargs):
        """As TRL's, with a quick start of what the model does; TRL's own asks a language model a question."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        start = (_ANSWERS if self.args.completion == "answer" else _DRAWS).format(
            model=self.hub_model_id or self.args.output_dir
        )
        card = re.sub(r"(?<=```python\n).*?(?=```)", lambda found: start, path.read_text(), count=1, flags=re.DOTALL)
        # A start that has no id.
        card = card.replace("a fine-tuned version of [None](https://huggingface.co/None)", "a fine-tuned NextFlow")
        write_whole(path, lambda file: file.write(card.encode()))

    # ---- rollouts ----------------------------------------------------------------------------------------------------

    @property
    def trains_suffix(self) -> bool:
        """Whether the update at hand trains the scales behind the prefix (VAR-RL: three prefix updates, then one)."""
        args, every = self.args, self.args.suffix_every if self.args.vmr_completions > 1 else 0
        # Updates that one rollout serves.
        updates = max(1, args.steps_per_generation * self.num_iterations // args.gradient_accumulation_steps)
        return bool(every) and self.model.training and self.state.global_step // updates % every == every - 1

    def roll_out(self, prompts: list) -> dict:
        """Let the model answer prompts.

        Returns:
            What TRL asks of a rollout: ids of prompts and completions (codes as entries of the vocabulary), `env_mask`
            (which of them are trained), and `drawn` for the reward functions.
        """
        conversations = [[{"role": "user", "content": own}] if isinstance(own, str) else own for own in prompts]
        inputs = self.processing_class.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            **{**self.chat_template_kwargs, "enable_thinking": self.args.completion == "thought"},
        ).to(self.accelerator.device)
        self._regions = None
        roll_out = {"picture": self._draw, "answer": self._answer, "thought": self._think}[self.args.completion]
        with self._generating() as model, torch.no_grad(), self.accelerator.autocast():
            completion_ids, masks = roll_out(model, inputs)
        if self.region_func is not None:
            # A value comes from all completions, so what any of them was rewarded for counts.
            regions = [
                [
                    region_mask(own, self.grids, self.image_size)
                    for own in self.region_func(prompts=prompts, drawn=drawn)
                ]
                for drawn in self._completions
            ]
            self._regions = torch.stack([torch.stack(own) for own in regions]).amax(dim=0)[:, : len(masks[0])]
        kept = inputs["attention_mask"].bool()
        return {
            "prompt_ids": [ids[own].tolist() for ids, own in zip(inputs["input_ids"], kept)],
            "completion_ids": completion_ids,
            "logprobs": None,
            "env_mask": masks,
            "drawn": self._completions[0],
        }

    def _draw(self, model, inputs) -> tuple[list, list]:
        """A picture per prompt: codes and which are trained. Those behind a trained prefix are not even scored."""
        args, rows = self.args, len(inputs["input_ids"])
        group = self.num_generations if self.model.training else self.num_generations_eval
        prefix = self._num_codes(self.prefix_scales)
        settings = {
            **inputs,
            "generation_mode": "image",
            "image_size": self.image_size,
            "guidance_scale": args.guidance_scale,
            "temperature": self._temperatures(len(self.grids) if self.trains_suffix else self.prefix_scales),
            "top_k": args.top_k,
            "top_p": args.top_p,
        }
        output = model.generate(**settings, seed=self._seeds(rows, 0))
        codes = torch.stack(output.codes)
        if self.trains_suffix:
            # The completions of a group share the prefix of its first.
            shared = codes[:, :prefix].unflatten(0, (-1, group))[:, :1].expand(-1, group, -1).flatten(0, 1)
            output = model.generate(**settings, prefix_codes=shared, seed=self._seeds(rows, 1))
            codes = torch.stack(output.codes)
        completions = [output.images]
        for turn in range(1, 1 if self.trains_suffix else args.vmr_completions):
            again = model.generate(**settings, prefix_codes=codes[:, :prefix], seed=self._seeds(rows, turn))
            completions.append(again.images)
        self._completions = [self._pictures_of(own) for own in completions]
        mask = [0] * prefix + [1] * (codes.shape[1] - prefix) if self.trains_suffix else [1] * prefix
        codes = codes[:, : len(mask)] + self._own_model().config.code_start_id
        return codes.tolist(), [mask] * rows

    def _answer(self, model, inputs) -> tuple[list, list]:
        """A text per prompt, up to the end of the turn."""
        args, config = self.args, self._own_model().generation_config
        with self._seeded():
            torch.manual_seed(self._seeds(1, 0)[0])
            output = model.generate(
                **inputs,
                do_sample=True,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                max_new_tokens=args.max_completion_length,
            )
        ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id or ())
        completion_ids = []
        for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
            last = next((place for place, own in enumerate(ids) if own in ends), len(ids) - 1)
            completion_ids.append(ids[: last + 1])
        self._completions = [[None] * len(completion_ids)]
        return completion_ids, [[1] * len(own) for own in completion_ids]

    def _think(self, model, inputs) -> tuple[list, list]:
        """A thought per prompt, and the picture that follows it, if one does."""
        args, config = self.args, self._own_model().config
        with self._seeded():
            torch.manual_seed(self._seeds(1, 0)[0])
            output = model.generate(
                **inputs,
                generation_mode="interleaved",
                image_size=self.image_size,
                seed=self._seeds(len(inputs["input_ids"]), 0),
                max_images=1,
                max_new_tokens=args.max_completion_length,
                do_sample=True,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                image_guidance_scale=args.guidance_scale,
                image_temperature=self._temperatures(self.prefix_scales),
                image_top_k=args.top_k,
                image_top_p=args.top_p,
            )
        completion_ids, drawn = [], []
        for segments, codes in zip(output.segments, output.codes):
            pictures = [place for place, own in enumerate(segments) if own.is_floating_point()]
            # The trajectory ends with its picture.
            text = segments[: pictures[0]] if pictures else segments
            ids = [token for own in text for token in own.tolist()]
            if pictures:
                kept = codes[0][: self._num_codes(self.prefix_scales)] + config.code_start_id
                ids += [config.boi_token_id, *kept.tolist()]
            completion_ids.append(ids)
            drawn += self._pictures_of([segments[pictures[0]]]) if pictures else [None]
        self._completions = [drawn]
        return completion_ids, [[1] * len(own) for own in completion_ids]

    def _num_codes(self, scales: int) -> int:
        return sum(height * width for height, width in self.grids[:scales])

    def _temperatures(self, trained: int) -> list[float]:
        own, suffix = self.args.temperature, self.args.suffix_temperature
        return [own if scale < trained or suffix is None else suffix for scale in range(len(self.grids))]

    def _pictures_of(self, images: list[torch.Tensor]) -> list:
        return self.processing_class.post_process_multimodal_output(torch.stack(images), generation_mode="image")

    def _generating(self):
        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )

    def _seeded(self):
        """Within it, text is sampled from a seed of this rollout's own."""
        device = self.accelerator.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def _seeds(self, number: int, turn: int) -> list[int]:
        """Seeds of a rollout's pictures, from the run's seed and their place in the run alone: a resumed run draws what
        it would have, and several processes what one would."""
        if self.model.training:
            place = (self.state.global_step, self._step % max(1, self.args.gradient_accumulation_steps), 1)
        else:
            place = (self.state.global_step, self._eval_rollouts, 0)
        rng = np.random.default_rng((self.args.seed, *place, turn))
        first = self.accelerator.process_index * number
        return rng.integers(2**62, size=first + number)[first:].tolist()

    def evaluate(self, *args, **kwargs):
        """As TRL's, with the same rollouts in every evaluation of the same weights."""
        self._eval_rollouts = 0
        return super().evaluate(*args, **kwargs)

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
        """Log-probabilities and entropies of completions: `(batch, completion)` each, by one teacher-forced pass.

        TRL's own go through the text head token by token, and would never see a code.
        """
        prompt_length = input_ids.shape[1] - logits_to_keep
        log_probs, entropies = [], []
        for first in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(first, first + (batch_size or len(input_ids)))
            completions = input_ids[rows, prompt_length:]
            is_given = attention_mask[rows, prompt_length:].bool()
            is_code = is_given & (completions >= self._own_model().config.code_start_id)
            inputs = self._scoring_inputs(
                [
                    ids[own.bool()]
                    for ids, own in zip(input_ids[rows, :prompt_length], attention_mask[rows, :prompt_length])
                ],
                [ids[own] for ids, own in zip(completions, is_given & ~is_code)],
                [ids[own] for ids, own in zip(completions, is_code)],
                self._context(pixel_values, num_images, rows, len(completions)),
            )
            with self.accelerator.autocast():
                output = model(
                    **inputs,
                    score_temperature=self.args.temperature,
                    score_drawing=self.args.completion == "thought",
                )
            for parts, tokens, codes in (
                (log_probs, output.token_log_probs, output.code_log_probs),
                (entropies, output.token_entropies, output.code_entropies),
            ):
                own = torch.zeros_like(completions, dtype=(tokens if codes is None else codes).dtype)
                own = own.masked_scatter(is_given & ~is_code, tokens)
                parts.append(own if codes is None else own.masked_scatter(is_code, codes))
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    def _scoring_inputs(self, prompts, texts, codes, context) -> dict[str, torch.Tensor]:
        """One pass over prompts and completions: what the model is given, and what of it is scored.

        Args:
            prompts: Ids of each prompt.
            texts: Ids of each completion's text, its `<boi>` with it where the model chose to draw.
            codes: Codes of each completion's picture, as entries of the vocabulary; none where there is no picture.
            context: Codes and grids of the pictures in each prompt.
        """
        config, device = self._own_model().config, self.accelerator.device
        drawn_grids = torch.tensor(self.grids, device=device)
        ids, scored_tokens, pictures, scored_codes, grids = [], [], [], [], []
        for prompt, text, own, seen in zip(prompts, texts, codes, context):
            row = torch.cat([prompt, text])
            # A token is scored at the position before it.
            labels = torch.full_like(row, -100)
            labels[len(prompt) - 1 : len(row) - 1] = text
            pictures += [each for each, _ in seen]
            grids += [each for _, each in seen]
            scored_codes += [torch.full_like(each, -100) for each, _ in seen]
            if len(own):
                slots = torch.full_like(own, config.image_token_id)
                slots[0] = config.boi_token_id
                # Where the text ends with <boi>, that is the first scale's slot.
                row = torch.cat([row[: len(row) - int(row[-1] == config.boi_token_id)], slots])
                labels = nn.functional.pad(labels, (0, len(row) - len(labels)), value=-100)
                pictures.append(own - config.code_start_id)
                scored_codes.append(pictures[-1])
                grids.append(drawn_grids)
            ids.append(row)
            scored_tokens.append(labels)
        pad = nn.utils.rnn.pad_sequence
        inputs = {
            "input_ids": pad(ids, batch_first=True, padding_value=self._tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(own) for own in ids], batch_first=True),
            "scored_tokens": pad(scored_tokens, batch_first=True, padding_value=-100),
        }
        if not pictures:
            return inputs
        return {
            **inputs,
            "image_codes": pad(pictures, batch_first=True, padding_value=-1),
            "image_grids": pad(grids, batch_first=True),
            "scored_codes": pad(scored_codes, batch_first=True, padding_value=-100),
        }

    def _context(self, pixel_values, num_images, rows: slice, number: int) -> list[list[tuple]]:
        """Codes and grids of the pictures in each prompt."""
        counts = [0] * number if num_images is None else num_images[rows]
        if pixel_values is None or not sum(counts):
            return [[] for _ in range(number)]
        first = sum(num_images[: rows.start])
        codes, grids = self._own_model().model.encode_images(pixel_values[first : first + sum(counts)])
        images = iter([(own, torch.tensor(each, device=own.device)) for own, each in zip(codes, grids)])
        return [[next(images) for _ in range(count)] for count in counts]

    # ---- rewards and advantages --------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Rewards of each picture, NaN where one failed; of several completions of a prefix, its value by each reward.

        TRL takes a reward that is missing for 0 beside one that is not, so a failure makes the whole row missing. The
        metric `rollout_reward` is the mean of what was drawn, whatever becomes of it.
        """
        rewards = []
        for drawn in self._completions:
            for own, picture in zip(inputs, drawn):
                own["drawn"] = picture
            found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            failed = torch.zeros(len(prompts), dtype=torch.bool, device=found.device)
            for own in self.reward_funcs:
                if isinstance(own, GuardedReward):
                    failed |= torch.tensor(own.failed, device=found.device)
            rewards.append(found.masked_fill(self.accelerator.gather(failed)[:, None], math.nan))
        plain = torch.cat(rewards)
        totals = (plain * self.reward_weights.to(plain.device)).nansum(dim=1)[~plain.isnan().all(dim=1)]
        self._metrics["train" if self.model.training else "eval"]["rollout_reward"].append(totals.mean().item())
        return rewards[0] if len(rewards) == 1 else middle_return(torch.stack(rewards), self.args.vmr_eta)

    def _generate_and_score_completions(self, inputs):
        """As TRL's, with an advantage per code: the scale weights, and 0 outside the regions."""
        self._eval_rollouts += not self.model.training
        self.rolled_out = [str(own.get("id", index)) for index, own in enumerate(inputs)]
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"].bool()
        is_code = mask & (output["completion_ids"] >= self._own_model().config.code_start_id)
        trained = output["tool_mask"].bool()
        weights = torch.ones_like(output["advantages"])[:, None].repeat(1, mask.shape[1])
        for row in is_code.any(dim=1).nonzero()[:, 0].tolist():
            own = scale_weights(self.grids, self.args.scale_weight_alpha, trained[row, is_code[row]])
            weights[row, is_code[row]] = own.to(weights)
        advantages = output["advantages"][:, None] * weights
        output["advantages"] = advantages if self._regions is None else advantages * self._regions.to(advantages)
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


class GuardedReward:
    """A reward function whose failures are errors by name, or leave its pictures out.

    Args:
        function: TRL's reward function, asynchronous or not.
        on_error: "raise", or "skip": `failed` then says which could not be scored.
        timeout: Seconds for a batch.

    Attributes:
        failed: Of the last call: whether each reward failed. `None` from the function is no failure: as in TRL, the
            reward does not apply there.
    """

    def __init__(self, function: Callable, on_error: str = "raise", timeout: float | None = None):
        self.function, self.on_error, self.timeout = function, on_error, timeout
        self.failed: list[bool] = []
        self.__name__ = get_callable_name(function)

    def __call__(self, prompts: list, **columns) -> list[float | None]:
        """As the function, `None` where it failed.

        Raises:
            RewardError: If it raises, takes too long, or returns what is no number for each prompt, where failures are
                to end the run.
        """
        ids = columns.get("id") or prompts
        try:
            rewards = list(within(self.timeout, self.function, prompts=prompts, **columns))
            if len(rewards) != len(prompts):
                raise ValueError(f"{len(rewards)} rewards for {len(prompts)} prompts")
            rewards = [None if own is None else float(own) for own in rewards]
        except Exception as error:
            if self.on_error == "raise":
                raise RewardError(
                    f"The reward {self.__name__!r} failed for the prompts {_short(ids)}: {error!r}"
                ) from error
            logger.warning("The reward %r failed for the prompts %s: %r", self.__name__, _short(ids), error)
            self.failed = [True] * len(prompts)
            return [None] * len(prompts)
        self.failed = [own is not None and not math.isfinite(own) for own in rewards]
        if any(self.failed):
            named = _short([own for own, failed in zip(ids, self.failed) if failed])
            found = [own for own, failed in zip(rewards, self.failed) if failed]
            if self.on_error == "raise":
                raise RewardError(f"The reward {self.__name__!r} is {found} for the prompts {named}.")
            logger.warning("The reward %r is %s for the prompts %s", self.__name__, found, named)
        return [None if failed else own for own, failed in zip(rewards, self.failed)]


def within(timeout: float | None, function: Callable, **kwargs):
    """What a function returns, asynchronous or not.

    Asynchronous ones share one event loop, in a thread of its own, so that a client made in the first call serves the
    later ones, and a notebook's own loop may run.

    Raises:
        TimeoutError: If that takes longer than `timeout` seconds. A function that hangs is left behind, and ends with
            the process.
    """
    if is_async_callable(function):
        answer = asyncio.run_coroutine_threadsafe(function(**kwargs), _reward_loop())
    elif timeout is None:
        return function(**kwargs)
    else:
        answer = Future()

        def work():
            answer.set_running_or_notify_cancel()
            try:
                answer.set_result(function(**kwargs))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
    # What the function raises is raised here, a TimeoutError of its own, too.
    if not wait([answer], timeout).done:
        answer.cancel()
        raise TimeoutError(f"no answer within {timeout} s")
    return answer.result()


@lru_cache(maxsize=1)
def _reward_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _short(ids: list, most: int = 8) -> str:
    told = [str(own) for own in dict.fromkeys(map(str, ids))]
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")
