"""Next-scale drawing inside `generate`.

`generation_mode` chooses: `"text"` is transformers' own `generate` with the image codes masked out; `"image"` draws one
picture per prompt; `"interleaved"` alternates until the model ends its turn. The drawing routine reads as numbered
steps in [`NextScaleGenerationMixin._draw`]: one pass over the prompts, then one pass per scale over that scale's slots
alone, all codes of a scale at once.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from queue import Queue

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .chunked_cross_entropy import is_plain
from .image_layout import block_positions, cached_time_offsets, find_images, layout_sequences, read_grids
from .masked_editing import KeptPicture, check_mask
from .scale_schedule import Grid, all_blocks

GENERATION_MODES = ("text", "image", "interleaved")
# The defaults of VAR-RL section 4.1, used where the checkpoint's generation config says nothing.
DEFAULT_SAMPLING = {"guidance_scale": 5.0, "temperature": 1.0, "top_k": 2, "top_p": 0.9}


@dataclass
class NextFlowImageOutput(ModelOutput):
    """Pictures that were drawn.

    Args:
        images (`list[torch.FloatTensor]`): Pixels `(3, height, width)` in [-1, 1] of each prompt's picture.
        codes (`list[torch.LongTensor]`): Codes of each picture, coarse to fine.
        grids (`list[tuple]`): Scales of each picture.
        log_probs (`list[torch.FloatTensor]`):
            Log-probability of each code under the model given the prompt, at temperature 1, without guidance and
            before top-k and top-p: what a teacher-forced pass over the drawn picture gives.
    """

    images: list | None = None
    codes: list | None = None
    grids: list | None = None
    log_probs: list | None = None


@dataclass
class NextFlowInterleavedOutput(ModelOutput):
    """Text and pictures in the order in which they were made.

    Args:
        segments (`list[list[torch.Tensor]]`):
            For each prompt its segments: int64 `(tokens,)` ids of text, or float32 `(3, height, width)` pixels.
        codes (`list[list[torch.LongTensor]]`): For each prompt the codes of its pictures, in order.
    """

    segments: list | None = None
    codes: list | None = None


@dataclass
class ScaleStep:
    """What a callback or streamer is handed after each scale.

    Attributes:
        scale: Index of the scale just drawn, from 0.
        num_scales: Number of scales of the largest picture in the batch.
        grids: All scales of each picture.
        codes: All codes of each picture so far, coarse to fine.
    """

    scale: int
    num_scales: int
    grids: list[tuple[Grid, ...]]
    codes: list[torch.LongTensor]
    _decode: Callable = field(repr=False)

    def preview(self) -> list[torch.Tensor]:
        """Decode what is drawn so far: pixels `(3, height, width)` at full size for each picture."""
        return self._decode(self.codes, self.grids)


class ScaleStreamer(BaseStreamer):
    """Iterator over the [`ScaleStep`]s of a drawing that runs in another thread.

    Args:
        timeout: Seconds to wait for the next scale before `queue.Empty` is raised; `None` waits for ever.
    """

    _END = object()

    def __init__(self, timeout: float | None = None):
        self.queue: Queue = Queue()
        self.timeout = timeout

    def put(self, value):
        self.queue.put(value)

    def end(self):
        self.queue.put(self._END)

    def __iter__(self):
        return self

    def __next__(self) -> ScaleStep:
        step = self.queue.get(timeout=self.timeout)
        if step is self._END:
            raise StopIteration
        return step


@dataclass(frozen=True)
class ImageSampling:
    """How codes are drawn from the model's scores.

    Temperature, top-k and top-p are one number, or one per scale, of which the last holds for all finer scales too:
    codes of one scale are drawn independently of each other, so a small model draws well what it only varies in its
    first scales.

    Attributes:
        guidance_scale: Strength of classifier-free guidance; 0 draws from the conditional scores alone. It grows
            over the scales: t_k = guidance_scale * k / (K - 1), scores = (1 + t_k) * cond - t_k * uncond.
        temperature: Divides the scores; 0 always takes the likeliest code.
        top_k: Codes kept, the likeliest first; 0 keeps all.
        top_p: Of these, the likeliest are kept until their probabilities reach this sum; 1 keeps all.
    """

    guidance_scale: float = DEFAULT_SAMPLING["guidance_scale"]
    temperature: float | Sequence[float] = DEFAULT_SAMPLING["temperature"]
    top_k: int | Sequence[int] = DEFAULT_SAMPLING["top_k"]
    top_p: float | Sequence[float] = DEFAULT_SAMPLING["top_p"]

    def __post_init__(self):
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"`guidance_scale` must be a finite number >= 0, got {self.guidance_scale}.")
        if not all(math.isfinite(own) and own >= 0 for own in _per_scale("temperature", self.temperature)):
            raise ValueError(f"`temperature` must be a finite number >= 0, got {self.temperature}.")
        if not all(own >= 0 and int(own) == own for own in _per_scale("top_k", self.top_k)):
            raise ValueError(f"`top_k` must be a whole number >= 0, got {self.top_k}.")
        if not all(0 < own <= 1 for own in _per_scale("top_p", self.top_p)):
            raise ValueError(f"`top_p` must lie in (0, 1], got {self.top_p}.")

    def at(self, scale: int) -> "ImageSampling":
        """What holds at a scale (from 0): one number each."""
        values = {name: _per_scale(name, getattr(self, name)) for name in ("temperature", "top_k", "top_p")}
        own = {name: numbers[min(scale, len(numbers) - 1)] for name, numbers in values.items()}
        return ImageSampling(self.guidance_scale, **own)


def _per_scale(name: str, value) -> Sequence:
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ValueError(f"`{name}` must be a number, or one number per scale, got {value}.")
    return values


def sample_codes(scores: torch.Tensor, uniforms: torch.Tensor, sampling: ImageSampling) -> torch.LongTensor:
    """Draw one code per row.

    Args:
        scores: float `(rows, codebook_size)`.
        uniforms: `(rows,)` numbers in [0, 1), the only randomness.
        sampling: Temperature, top-k and top-p, one number each.

    Returns:
        `(rows,)` codes.
    """
    if sampling.temperature == 0 or sampling.top_k == 1:
        return scores.argmax(dim=-1)
    probabilities, codes = kept_probabilities(scores, sampling)
    cumulative = probabilities.cumsum(dim=-1)
    thresholds = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    choice = (cumulative <= thresholds).sum(dim=-1, keepdim=True)
    # Rounding may put a threshold at the very end; the last code with any probability is meant.
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return codes.gather(-1, torch.minimum(choice, last))[:, 0]


def kept_probabilities(scores: torch.Tensor, sampling: ImageSampling) -> tuple[torch.Tensor, torch.LongTensor]:
    """What temperature, top-k and top-p leave of `scores` `(rows, codebook_size)`.

    Returns:
        Probabilities, which do not sum to 1 where top-p left some out, and their codes, both `(rows, kept)`, the
        likeliest first.
    """
    kept = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
    # top-k first: top-p then sorts k scores, not the codebook.
    scores, codes = (scores / sampling.temperature).topk(kept, dim=-1)
    probabilities = scores.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return probabilities.masked_fill(before >= sampling.top_p, 0), codes


def ramp(guidance_scale: float, scale: int, num_scales: int) -> float:
    """Guidance at a scale: linear from 0 at the first to `guidance_scale` at the last (VAR, TokenFlow)."""
    return guidance_scale * scale / max(1, num_scales - 1)


class _TextVocabulary(LogitsProcessor):
    """Masks what only drawing may produce: codes and placeholders; begin-of-image too where no picture may follow."""

    def __init__(self, config, images: bool):
        self.code_start_id = config.code_start_id
        self.banned = [config.image_token_id, config.eoi_token_id, *([] if images else [config.boi_token_id])]

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.code_start_id :] = -math.inf
        scores[:, self.banned] = -math.inf
        return scores


class _PictureLater(LogitsProcessor):
    """In a batch of texts, `<eoi>` tells the choice to draw: in a row that waits for others, `<boi>` would be taken for
    a picture."""

    def __init__(self, config):
        self.boi_token_id, self.eoi_token_id = config.boi_token_id, config.eoi_token_id

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.eoi_token_id] = scores[:, self.boi_token_id]
        scores[:, self.boi_token_id] = -math.inf
        return scores


_IMAGE_INPUTS = ("pixel_values", "image_codes", "image_grids")
# What `generate` takes for one picture, and not for those between texts.
_IMAGE_MODE_ONLY = (
    *("generator", "mask", "prefix_codes", "num_scales", "resampling", "best_of", "scorer"),
    *("negative_prompt_ids", "negative_prompt_attention_mask", "callback_on_scale_end", "streamer"),
)


class NextScaleGenerationMixin(GenerationMixin):
    """`generate` with next-scale drawing, for a model with `model`, `lm_head`, `vq_model` and a `NextFlowConfig`."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_mode: str | None = None, **kwargs):
        """Continue prompts with text, with a picture, or with both.

        Args:
            inputs: `input_ids` of the prompts, left-padded; may be given by name as well.
            generation_mode: `"text"` (default), `"image"` or `"interleaved"`.
            kwargs: In `"text"` mode, those of transformers' `generate`. In `"interleaved"` mode these for its text, and
                `image_size`, `seed`, `max_images` (pictures per prompt at most; 8 by default) and
                `image_guidance_scale`, `image_temperature`, `image_top_k`, `image_top_p` for its pictures;
                `max_new_tokens` is 256 where nothing says another number. In `"image"` mode the prompts (`input_ids`,
                `attention_mask`, and `pixel_values` or `image_codes` with `image_grids` for images they hold) and:

                * `image_size`: (height, width) in pixels, or one pair per prompt. By default the checkpoint's first
                  trained size, or the lowest resolution of the schedule.
                * `guidance_scale`, `temperature`, `top_k`, `top_p`: see [`ImageSampling`]; the last three may be lists,
                  one number per scale. Defaults come from `image_*` entries of `generation_config` where one is given,
                  else of the checkpoint's; its other entries are of text.
                * `seed`: one number (prompt i is drawn with seed + i), or one per prompt. A picture depends on its own
                  seed alone, not on what else is in the batch.
                * `generator`: `torch.Generator`, or one per prompt, instead of `seed`.
                * `mask`: `(height, width)`, or one per prompt (a list where sizes differ), not 0 where the last picture
                  of each prompt is drawn anew; elsewhere it is kept, its codes at every scale and its pixels up to a
                  soft edge one cell of the finest scale wide. The answer has its size.
                * `prefix_codes`: `(batch, codes)` codes of the first scales; only finer ones are drawn.
                * `num_scales`: draw only so many scales of a square picture, and show them as a picture of their own,
                  smaller size; a number of the tokenizer's `prefix_scales`.
                * `resampling`: passes that draw each scale after the first anew, fed with what was drawn of it: a list
                  of dicts of `temperature`, `top_k`, `top_p`, one a pass (TokenFlow). For models with
                  `visual_input="accumulated"`, whose inputs such codes are.
                * `best_of`, `scorer`: draw so many pictures per prompt (picture i of a prompt from its seed + 1000003
                  i) and keep the one for which `scorer` is largest: a function of the list of pictures (float tensors
                  `(3, height, width)` in [-1, 1], one per prompt) that returns a number each.
                * `negative_prompt_ids`, `negative_prompt_attention_mask`: what guidance leads away from; by default the
                  prompt without its text.
                * `use_cache`, `cache_implementation` (`"dynamic"` or `"static"`): the key-value cache.
                * `callback_on_scale_end`: called with a [`ScaleStep`] after each scale; returning `False` stops.
                * `streamer`: given each [`ScaleStep`] by `put`, then `end`.

        Returns:
            As transformers' `generate` in `"text"` mode, [`NextFlowImageOutput`] in `"image"` mode,
            [`NextFlowInterleavedOutput`] in `"interleaved"` mode.

        Raises:
            ValueError: If an argument is unknown or out of range, or the checkpoint lacks the ability.
        """
        given = kwargs.get("generation_config")
        if given is not None and not isinstance(given, GenerationConfig):
            raise ValueError(f"`generation_config` must be a `GenerationConfig`, got {type(given).__name__}.")
        mode = generation_mode or self._setting("generation_mode", given) or "text"
        if mode not in GENERATION_MODES:
            raise ValueError(f"`generation_mode` must be one of {GENERATION_MODES}, got {mode!r}.")
        if inputs is not None:
            kwargs["input_ids"] = inputs
        pixels = kwargs.get("pixel_values")
        if pixels is not None and kwargs.get("image_grids") is None:
            grids = self.config.schedule.grids_for_size(*pixels.shape[-2:])
            kwargs["image_grids"] = torch.tensor([grids] * len(pixels), device=pixels.device)
        has_images = any(kwargs.get(name) is not None for name in ("pixel_values", "image_codes"))
        self._check_abilities(mode, has_images)
        if mode == "text":
            processors = LogitsProcessorList([_TextVocabulary(self.config, images=False)])
            processors.extend(kwargs.pop("logits_processor", None) or [])
            return super().generate(logits_processor=processors, **kwargs)
        peft_model = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None)
        if getattr(getattr(peft_model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "Learned prompts (prompt and prefix tuning) reach text alone: drawing would ignore them. Use LoRA."
            )
        if mode == "image":
            if kwargs.get("best_of") is not None or kwargs.get("scorer") is not None:
                return self._best_images(**kwargs)
            return self._generate_images(**kwargs)
        return self._generate_interleaved(**kwargs)

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration: bool | None = False, **kwargs):
        """Images go in once; later text takes up the time at which they left it."""
        images = {name: kwargs.pop(name, None) for name in _IMAGE_INPUTS}
        model_inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if images["image_grids"] is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            # Those that a cache holds already have gone in.
            cache = model_inputs.get("past_key_values")
            cached = 0 if cache is None else int(cache.get_seq_length())
            spans = find_images(input_ids, read_grids(images["image_grids"]), self.config)
            new = [place for place, span in enumerate(spans) if span.start >= cached]
            if new:
                model_inputs.pop("position_ids", None)
                images = {name: None if own is None else own[new] for name, own in images.items()}
                # Pictures make their own mask; for a static cache transformers has made one of text.
                return {**model_inputs, **images, "attention_mask": kwargs.get("attention_mask")}
        offsets = cached_time_offsets(model_inputs.get("past_key_values"), len(input_ids))
        if offsets is not None and model_inputs.get("position_ids") is not None:
            model_inputs["position_ids"] = model_inputs["position_ids"] - offsets[:, None]
        return model_inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Beams and further answers see all pictures of their own prompt, in its order."""
        images = {name: model_kwargs.pop(name) for name in _IMAGE_INPUTS if model_kwargs.get(name) is not None}
        if images and expand_size > 1:
            rows = [span.row for span in find_images(input_ids, read_grids(images["image_grids"]), self.config)]
            order = torch.tensor(
                [
                    place
                    for row in range(len(input_ids))
                    for _ in range(expand_size)
                    for place, own in enumerate(rows)
                    if own == row
                ]
            )
            images = {name: own[order.to(own.device)] for name, own in images.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    # ---- what a checkpoint can do ------------------------------------------------------------------------------------

    def _check_abilities(self, mode: str, has_images: bool) -> None:
        abilities = self.config.abilities
        if abilities is None:
            return
        needed = {
            ("text", False): "text",
            ("text", True): "caption",
            ("image", False): "image",
            ("image", True): "edit",
            ("interleaved", False): "interleaved",
            ("interleaved", True): "interleaved",
        }[mode, has_images]
        if needed not in abilities:
            with_images = " with images in the prompt" if has_images else ""
            raise ValueError(
                f"This checkpoint was not trained for {needed!r} (generation_mode={mode!r}{with_images}); it can "
                f"{sorted(abilities)}. Fine-tune it, then list the ability in `config.abilities`."
            )

    def _check_image_size(self, size: tuple[int, int]) -> None:
        trained = self.config.trained_image_sizes
        if trained is not None and list(size) not in [list(known) for known in trained]:
            raise ValueError(
                f"This checkpoint was trained to draw {[f'{h}x{w}' for h, w in trained]} (height x width), not "
                f"{size[0]}x{size[1]}."
            )

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def _generate_images(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.LongTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        mask: torch.Tensor | None = None,
        prefix_codes: torch.LongTensor | None = None,
        num_scales: int | None = None,
        resampling: Sequence[dict] | None = None,
        negative_prompt_ids: torch.LongTensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        use_cache: bool = True,
        cache_implementation: str = "dynamic",
        callback_on_scale_end: Callable[[ScaleStep], bool | None] | None = None,
        streamer: BaseStreamer | None = None,
        guidance_scale: float | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        generation_config: GenerationConfig | None = None,
        **unknown,
    ) -> NextFlowImageOutput:
        # 1. Check everything before any work is done.
        if unknown:
            raise ValueError(f"generate(generation_mode='image') does not know the arguments {sorted(unknown)}.")
        input_ids, attention_mask = self._check_prompts(input_ids, attention_mask)
        batch = len(input_ids)
        sampling = self._image_sampling(
            generation_config, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        if resampling is None:
            resampling = self._setting("image_resampling", generation_config)
        passes = self._check_resampling(resampling, sampling, cache_implementation)
        if passes and mask is not None:
            raise ValueError("Give a `mask` or `resampling`, not both.")
        if negative_prompt_ids is not None and sampling.guidance_scale == 0:
            raise ValueError("A negative prompt needs guidance to lead away from it; give `guidance_scale` above 0.")
        generators = _row_generators(seed, generator, batch)
        if cache_implementation not in ("dynamic", "static"):
            raise ValueError(f'`cache_implementation` must be "dynamic" or "static", got {cache_implementation!r}.')
        if pixel_values is not None and image_codes is None:
            image_codes, context_grids = self.model.encode_images(pixel_values, image_grids)
        else:
            context_grids = read_grids(image_grids) if image_grids is not None else []
        kept = None
        if mask is not None:
            if image_size is not None:
                raise ValueError("With a `mask` the answer has the size of the picture; leave `image_size` out.")
            kept = self._kept_pictures(mask, input_ids, pixel_values, image_codes, context_grids)
            image_size = [self.config.schedule.image_size(own.grids[-1]) for own in kept]
        grids = self._check_sizes(image_size, batch)
        if num_scales is not None:
            self._check_num_scales(num_scales, grids, kept)
        if prefix_codes is not None:
            prefix_codes = self._check_prefix(prefix_codes, [own[:num_scales] for own in grids], kept)

        # 2. Every prompt ends with what opens a picture, the slot of the first scale.
        input_ids, attention_mask = self._end_prompts(input_ids, attention_mask)
        prompts = [(input_ids, attention_mask)]
        if sampling.guidance_scale > 0:
            prompts.append(
                self._unconditional(input_ids, attention_mask, negative_prompt_ids, negative_prompt_attention_mask)
            )

        # 3. Draw, and decode each picture once.
        codes, log_probs = self._draw(
            prompts=prompts,
            image_codes=image_codes,
            context_grids=context_grids,
            grids=grids,
            passes=[sampling, *passes],
            generators=generators,
            use_cache=use_cache,
            static_cache=cache_implementation == "static",
            callback=callback_on_scale_end,
            streamer=streamer,
            kept=kept,
            prefix_codes=prefix_codes,
            last_scale=num_scales,
        )
        grids = [own[:num_scales] for own in grids]
        images = self._decode_pictures(codes, grids)
        if kept is not None:
            images = [own.compose(image) for own, image in zip(kept, images)]
        return NextFlowImageOutput(images=images, codes=codes, grids=grids, log_probs=log_probs)

    def _best_images(self, best_of: int | None = None, scorer: Callable | None = None, **kwargs) -> NextFlowImageOutput:
        """Several pictures per prompt, of which the best by a scorer is kept."""
        if scorer is None or not isinstance(best_of, int) or best_of < 1:
            raise ValueError(f"Give both `scorer` and `best_of`, a whole number >= 1; got {scorer} and {best_of}.")
        if kwargs.get("streamer") is not None:
            raise ValueError("A `streamer` follows one picture; with `best_of`, leave it out.")
        input_ids = kwargs.get("input_ids")
        seeds = None if input_ids is None else _row_seeds(kwargs.pop("seed", None), len(input_ids))
        best, best_scores = None, []
        for turn in range(best_of):
            own = None if seeds is None else [seed + 1_000_003 * turn for seed in seeds]
            output = self._generate_images(**kwargs, seed=own)
            scores = [float(score) for score in scorer(output.images)]
            if len(scores) != len(output.images) or not all(map(math.isfinite, scores)):
                raise ValueError(f"`scorer` must return {len(output.images)} finite numbers, got {scores}.")
            if best is None:
                best, best_scores = output, scores
                continue
            for row, score in enumerate(scores):
                if score > best_scores[row]:
                    best_scores[row] = score
                    for name in ("images", "codes", "grids", "log_probs"):
                        best[name][row] = output[name][row]
        return best

    def _draw(
        self,
        prompts,
        image_codes,
        context_grids,
        grids,
        passes,
        generators,
        use_cache,
        static_cache,
        callback,
        streamer,
        kept,
        prefix_codes,
        last_scale,
    ) -> tuple[list[torch.LongTensor], list[torch.Tensor]]:
        """The next-scale loop, up to scale number `last_scale` where there is one.

        Returns the codes and log-probabilities of each picture.

        Rows of the forward passes are the conditional prompts, then (with guidance) the unconditional ones. Pictures
        may differ in size: a scale's slots are padded to the largest and masked.
        """
        batch, branches = len(grids), len(prompts)
        shown = [own[:last_scale] for own in grids]
        # A part of a picture is drawn as in the whole.
        num_scales = torch.tensor([len(own) for own in grids], device=prompts[0][0].device).repeat(branches)

        # 1. One pass over the prompts, both branches at once.
        embeds, positions, attention_mask, block_ids = self._open(prompts, image_codes, context_grids, grids)
        # Positions have three axes, time first, or one.
        start_time = positions[..., -1].reshape(-1, len(embeds))[0]
        cache = self._make_cache(use_cache, static_cache, embeds.shape[1], shown)
        hidden = self._pass(embeds, positions, attention_mask, block_ids, cache)[:, -1:]

        scales: list[list[torch.LongTensor]] = [[] for _ in range(batch)]
        log_probs: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        for scale in range(max(len(own) for own in shown)):
            # 2. From the second scale on: one pass over this scale's slots, fed with the scale before.
            if scale > 0:
                block, mask = self._block(scales, grids, scale, num_scales)
                own_positions = self._slot_positions(grids, scale, start_time, block.shape[1])
                attention_mask = torch.cat([attention_mask, mask], dim=1)
                block_ids = torch.cat([block_ids, torch.where(mask > 0, int(block_ids.max()) + 1, -1)], dim=1)
                seen = (attention_mask, block_ids, cache)
                if use_cache:
                    hidden = self._pass(block, own_positions, *seen)
                else:
                    before, positions = embeds, torch.cat([positions, own_positions], dim=-1)
                    embeds = torch.cat([before, block], dim=1)
                    hidden = self._pass(embeds, positions, *seen)[:, -block.shape[1] :]
            # 3. Scores of the codes alone, guided, and one draw per slot from the picture's own generator.
            scores = self._code_scores(hidden).to(num_scales.device)
            fixed = (generators, scales, kept, prefix_codes)
            drawn = self._draw_scale(scores, grids, scale, passes[0], *fixed)
            # 4. Where asked for, draw the scale anew, fed with itself. Finer scales never see these passes.
            for sampling in passes[1:] if scale > 0 else ():
                block, _ = self._block(scales, grids, scale, num_scales, drawn)
                if use_cache:
                    hidden = self._pass_again(block, own_positions, *seen)
                else:
                    hidden = self._pass(torch.cat([before, block], dim=1), positions, *seen)[:, -block.shape[1] :]
                scores_again = self._code_scores(hidden).to(num_scales.device)
                drawn = self._draw_scale(scores_again, grids, scale, sampling, *fixed)
            for row, codes in drawn.items():
                scales[row].append(codes)
                own_scores = scores[row, : len(codes)].log_softmax(dim=-1)
                log_probs[row].append(own_scores.gather(-1, codes[:, None])[:, 0])
            # 5. Tell who watches.
            if callback is not None or streamer is not None:
                step = ScaleStep(
                    scale=scale,
                    num_scales=max(len(own) for own in shown),
                    grids=shown,
                    codes=[torch.cat(own) for own in scales],
                    _decode=self._decode_pictures,
                )
                if streamer is not None:
                    streamer.put(step)
                if callback is not None and callback(step) is False:
                    break
        if streamer is not None:
            streamer.end()
        return [torch.cat(own) for own in scales], [torch.cat(own) for own in log_probs]

    def _draw_scale(
        self, scores, grids, scale, sampling, generators, scales, kept, prefix_codes
    ) -> dict[int, torch.LongTensor]:
        """Codes of one scale by row; rows whose picture is finished have none."""
        batch, codes = len(grids), {}
        for row in range(batch):
            if scale >= len(grids[row]):
                continue
            slots = grids[row][scale][0] * grids[row][scale][1]
            guided = scores[row, :slots]
            if len(scores) > batch:
                strength = ramp(sampling.guidance_scale, scale, len(grids[row]))
                guided = (1 + strength) * guided - strength * scores[batch + row, :slots]
            uniforms = torch.rand(slots, generator=generators[row], dtype=torch.float64)
            drawn = sample_codes(guided, uniforms.to(scores), sampling.at(scale))
            if kept is not None:
                drawn = kept[row].constrain(drawn, scale)
            first = sum(len(own) for own in scales[row])
            if prefix_codes is not None and first < prefix_codes.shape[1]:
                drawn = prefix_codes[row, first : first + slots]
            codes[row] = drawn
        return codes

    def _open(self, prompts, image_codes, context_grids, grids):
        """Embeddings, positions, mask and blocks of the prompts, all branches in one batch."""
        input_ids, attention_mask = _stack_left(prompts, pad_id=_pad_id(self.config))
        prompt_grids, prompt_codes = self._prompt_images(input_ids, context_grids, image_codes, grids, len(prompts))
        layout = layout_sequences(input_ids, attention_mask, prompt_grids, self.config)
        embeds = self.model.language_model.embed_tokens(input_ids)
        embeds = self.model.embed_images(embeds, layout.spans, prompt_codes)
        return embeds, layout.position_ids, attention_mask, layout.block_ids

    def _kept_pictures(self, mask, input_ids, pixel_values, image_codes, context_grids) -> list[KeptPicture]:
        """The last picture of each prompt with its mask."""
        spans = find_images(input_ids, context_grids, self.config)
        last = {span.row: index for index, span in enumerate(spans)}
        if len(last) != len(input_ids):
            raise ValueError("With a `mask` every prompt must hold the picture to edit; give `pixel_values`.")
        indices = [last[row] for row in range(len(input_ids))]
        grids = [context_grids[index] for index in indices]
        sizes = [self.config.schedule.image_size(own[-1]) for own in grids]
        masks = [own.to(input_ids.device) for own in check_mask(mask, sizes)]
        pixels = [
            None if pixel_values is None else pixel_values[index, :, :height, :width]
            for index, (height, width) in zip(indices, sizes)
        ]
        codes = [image_codes[index][image_codes[index] >= 0] for index in indices]
        return [KeptPicture(self.vq_model, *own) for own in zip(codes, grids, masks, pixels)]

    def _prompt_images(self, input_ids, context_grids, image_codes, grids, branches):
        """Grids and codes of all images in the rows, in order: those of the prompts, and the begun one of each row."""
        images_per_row = (input_ids == self.config.boi_token_id).sum(dim=1).tolist()
        no_codes = torch.empty(0, dtype=torch.long, device=input_ids.device)
        all_grids, all_codes = [], []
        for branch in range(branches):
            context = iter(range(len(context_grids)))
            for row, own in enumerate(grids):
                for _ in range(images_per_row[branch * len(grids) + row] - 1):
                    index = next(context, None)
                    if index is None:
                        raise ValueError(
                            f"The prompts hold more than the {len(context_grids)} images whose pixels or codes came."
                        )
                    all_grids.append(context_grids[index])
                    all_codes.append(image_codes[index].to(input_ids.device))
                all_grids.append(own)
                all_codes.append(no_codes)
        return all_grids, nn.utils.rnn.pad_sequence(all_codes, batch_first=True, padding_value=-1)

    def _block(self, scales, grids, scale, num_scales, drawn=None):
        """Embeddings and mask of one scale's slots for all rows, padded to the largest picture.

        `drawn` are codes of this very scale, by row, that the slots are fed as well.
        """
        branches = len(num_scales) // len(grids)
        active = [row for row in range(len(grids)) if scale < len(grids[row])]
        width = max(grids[row][scale][0] * grids[row][scale][1] for row in active)
        features = torch.zeros(len(grids), width, self.config.vq_config.code_dim, device=num_scales.device)
        mask = torch.zeros(len(grids), width, dtype=torch.long, device=num_scales.device)
        groups: dict = {}
        for row in active:
            groups.setdefault(grids[row], []).append(row)
        for own, rows in groups.items():
            slots = own[scale][0] * own[scale][1]
            device = self.vq_model.device
            before = [torch.stack([scales[row][k] for row in rows]).to(device) for k in range(scale)]
            codes = [each.unflatten(1, grid) for each, grid in zip(before, own)]
            fed = self.vq_model.scale_inputs(codes, own, self.config.visual_input)
            if drawn is not None:
                fed = fed + self.vq_model.codebook.lookup(torch.stack([drawn[row] for row in rows]).to(device))
            features[rows, :slots] = fed.to(features)
            mask[rows, :slots] = 1
        embeds = self.model.embed_block(features.repeat(branches, 1, 1), scale, num_scales)
        return embeds, mask.repeat(branches, 1)

    def _slot_positions(self, grids, scale, start_time, width):
        """Positions of one scale's slots for all rows: `(3, rows, width)`."""
        positions = torch.zeros(3, len(start_time), width, device=start_time.device)
        positions[0] = start_time[:, None] + scale
        for row in range(len(start_time)):
            own = grids[row % len(grids)]
            if scale < len(own):
                slots = own[scale][0] * own[scale][1]
                spatial = block_positions(own[scale], self.config.position_range, start_time.device)
                positions[1:, row, :slots] = spatial
        return positions

    def _pass(self, embeds, positions, attention_mask, block_ids, cache) -> torch.Tensor:
        return self.model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=attention_mask,
            block_sequence_ids=block_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _pass_again(self, block, positions, attention_mask, block_ids, cache) -> torch.Tensor:
        """A pass over a scale's slots that the cache holds already, and afterwards holds as before."""
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        cache.crop(-block.shape[1])
        hidden = self._pass(block, positions, attention_mask, block_ids, cache)
        for layer, (keys, values) in zip(cache.layers, kept):
            layer.keys, layer.values = keys, values
        return hidden

    def _code_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Only the code rows of the head: float32 (or wider) `(..., codebook_size)`."""
        start = self.config.code_start_id
        return self._head_scores(hidden, slice(start, start + self.config.vq_config.codebook_size))

    def _text_scores(self, hidden: torch.Tensor, images: bool) -> torch.Tensor:
        """Only the text rows of the head, -inf for what text may not hold: `(..., code_start_id)`."""
        scores = self._head_scores(hidden, slice(self.config.code_start_id))
        return _TextVocabulary(self.config, images)(None, scores)

    def _head_scores(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """Scores of some rows of the head; one that is wrapped or offloaded makes all of them."""
        if is_plain(self.lm_head, hidden):
            scores = nn.functional.linear(hidden, self.lm_head.weight[rows])
        else:
            scores = self.lm_head(hidden)[..., rows].to(hidden.device)
        return scores if scores.dtype == torch.float64 else scores.float()

    def _make_cache(self, use_cache: bool, static: bool, prompt_length: int, grids: list[tuple[Grid, ...]]):
        if not use_cache:
            return None
        text_config = self.config.text_config
        if not static:
            return DynamicCache(config=text_config)
        blocks = range(1, max(len(own) for own in grids))
        slots = sum(max(own[k][0] * own[k][1] for own in grids if k < len(own)) for k in blocks)
        return StaticCache(config=text_config, max_cache_len=prompt_length + slots)

    def _decode_pictures(self, codes: list[torch.LongTensor], grids: list[tuple[Grid, ...]]) -> list[torch.Tensor]:
        """Pixels of each picture; pictures of one shape are decoded together."""
        images: list[torch.Tensor | None] = [None] * len(codes)
        groups: dict = {}
        for row, own in enumerate(grids):
            groups.setdefault((own, len(codes[row])), []).append(row)
        for (own, _), rows in groups.items():
            chosen = torch.stack([codes[row] for row in rows])
            decoded = self.vq_model.decode(chosen.to(self.vq_model.device), own)
            for row, image in zip(rows, decoded.float().to(chosen.device)):
                images[row] = image
        return images

    # ---- text and pictures in turn -----------------------------------------------------------------------------------

    def _generate_interleaved(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.LongTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        image_size: tuple[int, int] | None = None,
        seed: int | Sequence[int] | None = None,
        max_images: int = 8,
        max_new_tokens: int | None = None,
        image_guidance_scale: float | None = None,
        image_temperature: float | Sequence[float] | None = None,
        image_top_k: int | Sequence[int] | None = None,
        image_top_p: float | Sequence[float] | None = None,
        generation_config: GenerationConfig | None = None,
        **text_kwargs,
    ) -> NextFlowInterleavedOutput:
        """Text until `<boi>`, a picture, `<eoi>`, and so on: the prompts' first text at once, then each on its own.

        A prompt ends with the end-of-turn token, with its `max_new_tokens`-th text token, or when `<boi>` comes after
        `max_images` pictures.
        """
        setting = partial(self._setting, generation_config=generation_config)
        if max_new_tokens is None:
            max_new_tokens = setting("max_new_tokens") or 256
        if max_images < 0 or max_new_tokens < 1:
            raise ValueError(f"Need max_images >= 0 and max_new_tokens >= 1, got {max_images} and {max_new_tokens}.")
        answers, as_dict = (
            text_kwargs.get(name, setting(name)) for name in ("num_return_sequences", "return_dict_in_generate")
        )
        if answers not in (None, 1) or as_dict:
            raise ValueError(
                "Interleaved generation returns one answer for each prompt, as segments: leave out "
                "`num_return_sequences` and `return_dict_in_generate`, and repeat the prompt for more answers."
            )
        refused = sorted(name for name in _IMAGE_MODE_ONLY if text_kwargs.pop(name, None) is not None)
        if refused:
            raise ValueError(
                f'Interleaved generation does not take {refused}; these belong to `generation_mode="image"`.'
            )
        input_ids, attention_mask = self._check_prompts(input_ids, attention_mask)
        if pixel_values is not None and image_codes is None:
            image_codes, context_grids = self.model.encode_images(pixel_values, image_grids)
        else:
            context_grids = read_grids(image_grids) if image_grids is not None else []
        seeds = _row_seeds(seed, len(input_ids))
        spans = find_images(input_ids, context_grids, self.config)
        context_codes = [] if image_codes is None else [own[own >= 0] for own in image_codes]
        boi, eoi = self.config.boi_token_id, self.config.eoi_token_id
        ends = _as_list(text_kwargs.pop("eos_token_id", setting("eos_token_id")))
        fillings = (text_kwargs.get("pad_token_id"), setting("pad_token_id"), *ends, 0)
        text_kwargs["pad_token_id"] = pad = next(own for own in fillings if own is not None)
        text_kwargs["generation_config"] = generation_config
        processors = [_TextVocabulary(self.config, images=True), *(text_kwargs.pop("logits_processor", None) or [])]
        first_texts = super().generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **_image_inputs(context_codes, context_grids),
            max_new_tokens=max_new_tokens,
            eos_token_id=[*ends, eoi],
            logits_processor=LogitsProcessorList([*processors, _PictureLater(self.config)]),
            **text_kwargs,
        )[:, input_ids.shape[1] :]
        text_kwargs.update(eos_token_id=[*ends, boi], logits_processor=LogitsProcessorList(processors))
        output = NextFlowInterleavedOutput(segments=[], codes=[])
        for row in range(len(input_ids)):
            own = [index for index, span in enumerate(spans) if span.row == row]
            ids = input_ids[row][attention_mask[row] > 0][None]
            codes, grids = [context_codes[index] for index in own], [context_grids[index] for index in own]
            segments, drawn = [], []
            budget, images = max_new_tokens, _image_inputs(codes, grids)
            generated = _until_end(first_texts[row], [*ends, boi, eoi], pad)
            generated = generated.masked_fill(generated == eoi, boi)
            while True:
                budget -= len(generated)
                wants_image = len(generated) > 0 and int(generated[-1]) == boi
                text = generated[:-1] if wants_image else generated
                if len(text):
                    segments.append(text)
                if not wants_image or len(drawn) == max_images:
                    break
                ids = torch.cat([ids, generated[None]], dim=1)
                picture = self._generate_images(
                    ids,
                    **images,
                    image_size=image_size,
                    seed=None if seeds is None else seeds[row] + len(drawn),
                    guidance_scale=image_guidance_scale,
                    temperature=image_temperature,
                    top_k=image_top_k,
                    top_p=image_top_p,
                    generation_config=generation_config,
                )
                segments.append(picture.images[0])
                drawn.append(picture.codes[0])
                codes.append(picture.codes[0])
                grids.append(picture.grids[0])
                images = _image_inputs(codes, grids)
                blocks = grids[-1][1:] if self.config.context_image == "scales" else all_blocks(grids[-1])
                slots = sum(height * width for height, width in blocks)
                closing = [self.config.image_token_id] * slots + [self.config.eoi_token_id]
                ids = torch.cat([ids, ids.new_tensor([closing])], dim=1)
                if budget == 0:
                    break
                generated = super().generate(input_ids=ids, **images, max_new_tokens=budget, **text_kwargs)[
                    0, ids.shape[1] :
                ]
            output.segments.append(segments)
            output.codes.append(drawn)
        return output

    # ---- arguments ---------------------------------------------------------------------------------------------------

    def _setting(self, name: str, generation_config: GenerationConfig | None):
        """An entry of a call's generation config, else of the checkpoint's; `None` where neither has it."""
        values = [getattr(own, name, None) for own in (generation_config, self.generation_config)]
        return values[1] if values[0] is None else values[0]

    def _image_sampling(self, generation_config: GenerationConfig | None = None, **given) -> ImageSampling:
        """Arguments, else the `image_*` generation settings, else VAR-RL's."""
        chosen = {}
        for name, value in given.items():
            if value is None:
                value = self._setting(f"image_{name}", generation_config)
            chosen[name] = DEFAULT_SAMPLING[name] if value is None else value
        return ImageSampling(**chosen)

    def _check_resampling(self, resampling, sampling: ImageSampling, cache_implementation: str) -> list[ImageSampling]:
        """Sampling of the passes that draw a scale anew."""
        if not resampling:
            return []
        if self.config.visual_input != "accumulated":
            raise ValueError(
                "`resampling` feeds a scale with its own codes, which this checkpoint never saw in training "
                f'(`visual_input` is "{self.config.visual_input}").'
            )
        if cache_implementation == "static":
            raise ValueError('`resampling` needs a cache that can be cropped; leave `cache_implementation` "dynamic".')
        known = {"temperature", "top_k", "top_p"}
        if not isinstance(resampling, (list, tuple)) or not all(
            isinstance(own, dict) and set(own) <= known for own in resampling
        ):
            raise ValueError(f"`resampling` is a list of dicts of {sorted(known)}, one a pass; got {resampling}.")
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return [ImageSampling(sampling.guidance_scale, **{**plain, **own}) for own in resampling]

    def _check_prompts(self, input_ids, attention_mask) -> tuple[torch.LongTensor, torch.LongTensor]:
        if input_ids is None or input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError("`input_ids` must hold at least one prompt of at least one token, as (batch, length).")
        vocabulary = self.config.text_config.vocab_size
        if input_ids.min() < 0 or input_ids.max() >= vocabulary:
            raise ValueError(f"Token ids must lie in 0..{vocabulary - 1}.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` {tuple(attention_mask.shape)} does not fit `input_ids` {tuple(input_ids.shape)}."
            )
        attention_mask = attention_mask.long()
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("Prompts must be padded on the left: the last position of each row must be a token.")
        return input_ids.to(self.device), attention_mask.to(self.device)

    def _check_sizes(self, image_size, batch: int) -> list[tuple[Grid, ...]]:
        """Scales of each picture."""
        schedule = self.config.schedule
        if image_size is None:
            trained = self.config.trained_image_sizes
            image_size = tuple(trained[0]) if trained else (min(schedule.resolutions),) * 2
        if isinstance(image_size[0], int):
            image_size = [image_size] * batch
        if len(image_size) != batch:
            raise ValueError(f"`image_size` holds {len(image_size)} sizes for {batch} prompts.")
        grids = []
        for size in image_size:
            if len(size) != 2 or not all(isinstance(side, int) for side in size):
                raise ValueError(f"An image size is (height, width) in whole pixels, got {size}.")
            grids.append(schedule.grids_for_size(*size))
            self._check_image_size(tuple(size))
        return grids

    def _check_num_scales(self, num_scales: int, grids, kept) -> None:
        """Whether the tokenizer shows so many scales of these pictures in a size of their own."""
        known = self.config.vq_config.prefix_scales
        if num_scales not in known:
            can = f"shows the first {' or '.join(map(str, known))}" if known else "was not trained to show first scales"
            raise ValueError(f"`num_scales` is {num_scales}, but this image tokenizer {can} as a picture of their own.")
        if kept is not None:
            raise ValueError("Give a `mask` or `num_scales`, not both: what a mask keeps has the picture's whole size.")
        for own in grids:
            if own[-1][0] != own[-1][1] or len(own) <= num_scales:
                size = "x".join(map(str, self.config.schedule.image_size(own[-1])))
                raise ValueError(
                    f"`num_scales` is {num_scales}, for square pictures of more scales; {size} has {len(own)}."
                )

    def _check_prefix(self, prefix_codes: torch.LongTensor, grids, kept) -> torch.LongTensor:
        """Codes of the first scales of every picture, on this device."""
        if kept is not None:
            raise ValueError("Give a `mask` or `prefix_codes`, not both.")
        for own in grids:
            whole = [0, *itertools.accumulate(height * width for height, width in own)]
            if prefix_codes.ndim != 2 or len(prefix_codes) != len(grids) or prefix_codes.shape[1] not in whole:
                raise ValueError(
                    f"`prefix_codes` must be ({len(grids)}, codes) with one of {whole} codes (whole scales), got "
                    f"{tuple(prefix_codes.shape)}."
                )
        self.vq_model._check_codes(prefix_codes)
        return prefix_codes.to(self.device)

    def _end_prompts(self, input_ids, attention_mask):
        """End each row with `<boi>`, unless all do already."""
        if bool((input_ids[:, -1] == self.config.boi_token_id).all()):
            return input_ids, attention_mask
        if bool((input_ids[:, -1] == self.config.boi_token_id).any()):
            raise ValueError("Either all prompts of a batch end with the begin-of-image token, or none.")
        boi = torch.full_like(input_ids[:, :1], self.config.boi_token_id)
        return torch.cat([input_ids, boi], dim=1), torch.cat([attention_mask, torch.ones_like(boi)], dim=1)

    def _unconditional(self, input_ids, attention_mask, negative_ids, negative_mask):
        """The other branch of guidance: a negative prompt, or the prompt's images without its text.

        Training drops the whole text before the picture, so the branch without text is `<boi>` behind the images.
        """
        if negative_ids is not None:
            negative_ids, negative_mask = self._check_prompts(negative_ids, negative_mask)
            if len(negative_ids) == 1:
                negative_ids, negative_mask = (x.expand(len(input_ids), -1) for x in (negative_ids, negative_mask))
            if len(negative_ids) != len(input_ids):
                raise ValueError(f"{len(negative_ids)} negative prompts were given for {len(input_ids)} prompts.")
            return self._end_prompts(negative_ids, negative_mask)
        image_tokens = torch.tensor(
            [self.config.boi_token_id, self.config.image_token_id, self.config.eoi_token_id], device=input_ids.device
        )
        return input_ids, attention_mask * torch.isin(input_ids, image_tokens)


def _row_seeds(seed, batch: int) -> list[int] | None:
    if seed is None:
        return None
    if isinstance(seed, Integral):
        return [int(seed) + row for row in range(batch)]
    if len(seed) != batch:
        raise ValueError(f"{len(seed)} seeds were given for {batch} prompts.")
    return [int(own) for own in seed]


def _row_generators(seed, generator, batch: int) -> list[torch.Generator | None]:
    """One source of randomness per picture, on the CPU so that it is the same on every device."""
    if seed is not None and generator is not None:
        raise ValueError("Give `seed` or `generator`, not both.")
    if generator is not None:
        generators = [generator] * batch if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != batch:
            raise ValueError(f"{len(generators)} generators were given for {batch} prompts.")
        if any(own.device.type != "cpu" for own in generators):
            raise ValueError("Generators must live on the CPU, so that a picture is the same on every device.")
        return generators
    seeds = _row_seeds(seed, batch)
    if seeds is None:
        return [None] * batch
    return [torch.Generator().manual_seed(own) for own in seeds]


def _pad_id(config) -> int:
    pad_id = config.text_config.pad_token_id
    return 0 if pad_id is None else pad_id


def _as_list(value) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _stack_left(prompts, pad_id: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Stack branches of unequal length into one left-padded batch."""
    length = max(ids.shape[1] for ids, _ in prompts)
    ids = [nn.functional.pad(ids, (length - ids.shape[1], 0), value=pad_id) for ids, _ in prompts]
    masks = [nn.functional.pad(mask, (length - mask.shape[1], 0)) for _, mask in prompts]
    return torch.cat(ids), torch.cat(masks)


def _until_end(text: torch.LongTensor, ends: list[int], pad: int) -> torch.LongTensor:
    """A row of a batch up to the first of some tokens, or without what fills it up where other rows went on longer."""
    is_end = torch.isin(text, text.new_tensor(ends))
    if is_end.any():
        return text[: int(is_end.int().argmax()) + 1]
    length = len(text)
    while length and int(text[length - 1]) == pad:
        length -= 1
    return text[:length]


def _image_inputs(codes: list[torch.LongTensor], grids: list[tuple[Grid, ...]]) -> dict[str, torch.Tensor]:
    """Codes and grids of the images so far as padded tensors; nothing if there are none."""
    if not codes:
        return {}
    scales = [torch.tensor(own) for own in grids]
    return {
        "image_codes": nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1),
        "image_grids": nn.utils.rnn.pad_sequence(scales, batch_first=True),
    }
