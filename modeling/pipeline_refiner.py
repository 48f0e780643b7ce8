"""The refiner as a diffusers pipeline: codes or a picture in, a refined or doubled picture out."""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps

from .modeling_refiner import UPSAMPLING, NextFlowRefinerModel, refiner_condition


class NextFlowRefinerPipeline(DiffusionPipeline):
    """Paints a picture anew from what its codes say (NextFlow section 2.3), at its own size or twice as large.

    Args:
        refiner ([`NextFlowRefinerModel`]): The denoiser.
        scheduler (diffusers scheduler): A flow-matching one, such as `FlowMatchEulerDiscreteScheduler`.
        vq_model ([`NextFlowVQModel`]): The tokenizer whose codes the refiner was trained on.
        vae (`AutoencoderKL`, *optional*): For a refiner of latents; without one, pixels are refined.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): For a refiner that embeds captions itself.
        supersampling (`int`, defaults to 1): 2 for a refiner that paints a picture of its own size doubled, too, and
            averages the result: finer edges for four times the work.
    """

    model_cpu_offload_seq = "vq_model->refiner->vae"
    # Its parts are used beside its own forward pass, which alone would bring them back one by one.
    _exclude_from_cpu_offload = ["vq_model"]
    _optional_components = ["vae", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self, refiner: NextFlowRefinerModel, scheduler, vq_model, vae=None, tokenizer=None, supersampling: int = 1
    ):
        super().__init__()
        if supersampling not in UPSAMPLING:
            raise ValueError(f"`supersampling` is one of {UPSAMPLING}, got {supersampling}.")
        self.register_modules(refiner=refiner, scheduler=scheduler, vq_model=vq_model, vae=vae, tokenizer=tokenizer)
        self.register_to_config(supersampling=supersampling)
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Guidance of the last call."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to stop (`pipe._interrupt = True`)."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        image=None,
        codes: torch.LongTensor | Sequence[torch.LongTensor] | None = None,
        grids=None,
        prompt: str | list[str] | None = None,
        upsampling: int = 1,
        strength: float = 1.0,
        num_inference_steps: int = 8,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            image: Pictures of one size: PIL (transparency is laid on white), arrays `(height, width, 3)` in [0, 1] or
                of uint8, or a tensor `(batch, 3, height, width)` in [0, 1]. Sides are multiples of the tokenizer's
                patch.
            codes: Instead, `(batch, num_codes)` as `generate` and the tokenizer give them.
            grids: The scales of `codes`.
            prompt: What the pictures show, one for all or one each; nothing by default.
            upsampling: 1 for the picture's own size, 2 for twice that.
            strength: How much is painted anew, from 0 to 1: the share of noise at which painting begins, whatever the
                scheduler's shift. At 0 the input is given back as it is (doubled: resized bicubically).
            num_inference_steps: Steps from noise alone; as in diffusers' img2img pipelines, a `strength` below 1 takes
                that share of them, and one at least.
            sigmas: Shares of noise instead, from high to low; the first stands in place of `strength`. Not with
                schedulers that set their own.
            guidance_scale: How far to go from no caption towards the caption; 1 is the caption alone. A base that was
                distilled to take the scale is given it.
            num_images_per_prompt: How many results of each picture.
            generator: Source of the noise, one or one for each result.
            latents: The noise itself, of the shape of what is denoised.
            prompt_embeds: `(batch, tokens, text_dim)` states of the captions, from a base's own text encoders.
            pooled_prompt_embeds: `(batch, pooled_dim)` of the captions, for a base that takes them.
            output_type: "pil", "np", "pt" or "latent" (as it was painted, with `supersampling` twice as large).
            return_dict: `False` gives a tuple.
            callback_on_step_end: `(pipeline, step, timestep, tensors) -> tensors`, after each step.
            callback_on_step_end_tensor_inputs: What it is handed; of `_callback_tensor_inputs`.

        Raises:
            ValueError: If inputs do not fit each other, the tokenizer or the refiner, or the scheduler's models do not
                predict velocities.
        """
        # 1. Refuse what cannot work before anything is computed.
        self._check(image, codes, grids, sigmas, output_type)
        self._check_caption(prompt, prompt_embeds, pooled_prompt_embeds)
        self.check_settings(upsampling, strength, num_inference_steps)
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be at least 1, got {num_images_per_prompt}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"A callback may have {self._callback_tensor_inputs}, not {sorted(unknown)}.")
        self._guidance_scale, self._interrupt, self._num_timesteps = guidance_scale, False, 0
        device = self._execution_device

        # 2. The picture in [-1, 1], and its codes.
        pixels, codes, grids = self._read(image, codes, grids, device)
        number = len(pixels)
        results = number * num_images_per_prompt
        if latents is None and isinstance(generator, list) and len(generator) != results:
            raise ValueError(f"{len(generator)} generators were given for {results} pictures.")
        if strength == 0 and sigmas is None:
            return self._untouched(image, pixels, upsampling, num_images_per_prompt, output_type, return_dict)

        # 3. What the refiner is told: the codes, the picture at the result's size, the caption.
        dtype = self.refiner.dtype
        painted = max(upsampling, self.config.supersampling)
        self._wake(self.vq_model)
        condition = refiner_condition(self.vq_model, codes, grids).to(dtype)
        target = self._to_latents(_resized(pixels, painted).to(dtype))
        condition, target = (own.repeat_interleave(num_images_per_prompt, 0) for own in (condition, target))
        caption = self._caption(prompt, prompt_embeds, pooled_prompt_embeds, number, num_images_per_prompt, device)
        distilled = getattr(self.refiner.denoiser.config, "guidance_embeds", False)
        if distilled:
            caption["guidance"] = torch.full((results,), guidance_scale, device=device, dtype=dtype)
        guides = guidance_scale != 1 and not distilled and len(caption) > 0

        # 4. Where on the way from noise to picture to begin.
        timesteps = self._timesteps(num_inference_steps, strength, sigmas, target.shape, device)
        self._num_timesteps = len(timesteps)
        noise = latents
        if noise is None:
            noise = randn_tensor(target.shape, generator=generator, device=device, dtype=dtype)
        elif noise.shape != target.shape:
            raise ValueError(f"`latents` must have the shape {tuple(target.shape)}, got {tuple(noise.shape)}.")
        noise = noise.to(device, dtype)
        add_noise = getattr(self.scheduler, "scale_noise", None)
        if add_noise is not None:
            latents = add_noise(target, timesteps[:1], noise)
        else:
            latents = self.scheduler.add_noise(target, noise, timesteps[:1])

        # 5. Towards the picture.
        told = {"condition": condition, "upsampling": painted}
        if self.refiner.config.image_condition:
            told["image"] = target
        # Some schedulers add noise of their own.
        takes = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, time in enumerate(timesteps):
                if self._interrupt:
                    continue
                velocity = self.refiner(latents, time, **told, **caption).sample
                if guides:
                    plain = self.refiner(latents, time, **told).sample
                    velocity = plain + guidance_scale * (velocity - plain)
                latents = self.scheduler.step(velocity, time, latents, return_dict=False, **extra)[0]
                if callback_on_step_end is not None:
                    handed = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = (callback_on_step_end(self, step, time, handed) or {}).pop("latents", latents)
                progress_bar.update()

        # 6. Pixels.
        if output_type == "latent":
            images = latents
        else:
            pixels = self._to_pixels(latents).clamp(-1, 1)
            images = self._to_images(F.avg_pool2d(pixels, painted // upsampling), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---- the steps' parts --------------------------------------------------------------------------------------------

    @staticmethod
    def check_settings(upsampling: int, strength: float, num_inference_steps: int) -> None:
        """Raise `ValueError` where one is out of its range."""
        if upsampling not in UPSAMPLING or not isinstance(upsampling, Integral):
            raise ValueError(f"`upsampling` is one of {UPSAMPLING}, got {upsampling}.")
        if not 0 <= strength <= 1:
            raise ValueError(f"`strength` must lie in [0, 1], got {strength}.")
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}.")

    def _check(self, image, codes, grids, sigmas, output_type) -> None:
        if (image is None) == (codes is None):
            raise ValueError("Give either `image` or `codes`.")
        if (codes is None) != (grids is None):
            raise ValueError("`codes` and `grids`, which tell their scales, belong together.")
        if isinstance(image, (list, tuple)) and not image:
            raise ValueError("`image` is an empty list.")
        if sigmas is not None:
            falls = all(first > second for first, second in itertools.pairwise(sigmas))
            if not (len(sigmas) and falls and all(0 < own <= 1 for own in sigmas)):
                raise ValueError(f"`sigmas` are shares of noise in (0, 1], from high to low, got {sigmas}.")
            if not self._takes_sigmas():
                raise ValueError(f"{type(self.scheduler).__name__} sets its own sigmas; leave `sigmas` out.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type` is "pil", "np", "pt" or "latent", got {output_type!r}.')
        config = self.scheduler.config
        is_flow = type(self.scheduler).__name__.startswith("FlowMatch") or (
            config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
        )
        if not is_flow or config.get("invert_sigmas"):
            raise ValueError(
                "The refiner predicts velocities of a flow from noise to picture, which "
                f"{type(self.scheduler).__name__} as it is set does not expect. Use a FlowMatch scheduler, or one made "
                'with `prediction_type="flow_prediction", use_flow_sigmas=True`.'
            )

    def _check_caption(self, prompt, embeds, pooled) -> None:
        if prompt is not None and embeds is not None:
            raise ValueError("Give `prompt` or `prompt_embeds`, not both.")
        if prompt is not None and self.tokenizer is None:
            raise ValueError(
                "This refiner has no tokenizer for a `prompt`; give `prompt_embeds` (and `pooled_prompt_embeds`) of "
                "its base's text encoders, for example from `FluxPipeline.encode_prompt`."
            )
        if pooled is not None and not self.refiner.takes_pooled_caption:
            raise ValueError("This refiner's base takes no `pooled_prompt_embeds`.")

    def _takes_sigmas(self) -> bool:
        return "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters

    @staticmethod
    def _wake(module) -> None:
        """Bring a module that is offloaded to its device: accelerate's hook knows of `forward` alone."""
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(module)

    def _read(self, image, codes, grids, device):
        """Pixels `(batch, 3, height, width)` in [-1, 1], codes and scales."""
        self._wake(self.vq_model)
        if codes is None:
            pixels = self._pixels(image).to(device, torch.float32)
            encoding = self.vq_model.encode(pixels)
            return pixels, encoding.codes, encoding.grids
        codes = torch.stack(list(codes)) if not torch.is_tensor(codes) else codes
        codes = codes.to(device)
        grids = tuple(tuple(int(side) for side in grid) for grid in grids)
        return self.vq_model.decode(codes, grids).float(), codes, grids

    def _pixels(self, image) -> torch.Tensor:
        """`(batch, 3, height, width)` in [-1, 1]."""
        own = [image] if isinstance(image, (Image.Image, np.ndarray)) else image
        if isinstance(own, (list, tuple)):
            own = [_rgb(each) if isinstance(each, Image.Image) else each for each in own]
            own = [each / 255 if _is_bytes(each) else each for each in own]
        elif _is_bytes(own):
            own = own / 255
        for each in [own] if torch.is_tensor(own) else own:
            if not isinstance(each, Image.Image) and (each.min() < 0 or each.max() > 1):
                raise ValueError(f"Pixels must lie in [0, 1] (or be uint8), got {each.min():.3g} to {each.max():.3g}.")
        return self.image_processor.preprocess(own)

    def _untouched(self, image, pixels, upsampling, copies, output_type, return_dict):
        """The input itself, copied where it is a picture already."""
        is_list = isinstance(image, (list, tuple))
        first = image[0] if is_list else image
        if upsampling == 1 and output_type == "pil" and isinstance(first, Image.Image):
            images = [each.copy() for each in (image if is_list else [image]) for _ in range(copies)]
        elif upsampling == 1 and output_type == "pt" and torch.is_tensor(image):
            images = image.repeat_interleave(copies, 0)
        else:
            target = _resized(pixels, upsampling).repeat_interleave(copies, 0)
            if output_type == "latent":
                images = self._to_latents(target.to(self.refiner.dtype))
            else:
                images = self._to_images(target, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _caption(self, prompt, embeds, pooled, number, copies, device) -> dict[str, torch.Tensor]:
        """What the refiner takes of the captions."""
        told = {}
        if prompt is not None:
            prompts = [prompt] * number if isinstance(prompt, str) else list(prompt)
            if len(prompts) != number:
                raise ValueError(f"{len(prompts)} prompts were given for {number} pictures.")
            told = caption_inputs(self.tokenizer, prompts)
        elif embeds is not None:
            told["encoder_hidden_states"] = embeds
        if pooled is not None:
            told["pooled_projections"] = pooled
        for name, own in told.items():
            if len(own) != number:
                raise ValueError(f"`{name}` of {len(own)} captions were given for {number} pictures.")
        return {name: own.to(device).repeat_interleave(copies, 0) for name, own in told.items()}

    def _timesteps(self, steps: int, strength: float, sigmas, shape, device) -> torch.Tensor:
        """Set the scheduler to begin at `strength`, or at the first of `sigmas`."""
        settings, shift = {"device": device}, self.scheduler.config.get("shift") or 1.0
        if self.scheduler.config.get("use_dynamic_shifting"):
            # As FLUX: more noise for more tokens, on a line between two lengths.
            config, tokens = self.scheduler.config, shape[-2] * shape[-1] / self.refiner.config.patch_size**2
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
            settings["mu"] = config.get("base_shift", 0.5) + slope * (tokens - low)
            is_linear = config.get("time_shift_type") == "linear"
            shift = settings["mu"] if is_linear else math.exp(settings["mu"])
        taken = max(1, round(steps * strength))
        if self._takes_sigmas():
            # The scheduler will shift them, so that they must be shifted back before.
            if sigmas is None:
                first = strength / (shift - (shift - 1) * strength)
                before = np.linspace(first, first / taken, taken)
            else:
                before = np.array([own / (shift - (shift - 1) * own) for own in sigmas])
            self.scheduler.set_timesteps(sigmas=before.tolist(), **settings)
            begin = 0
        else:
            total = max(taken, round(taken / strength))
            self.scheduler.set_timesteps(total, **settings)
            begin = total - taken
        order = self.scheduler.order
        self.scheduler.set_begin_index(begin * order)
        return self.scheduler.timesteps[begin * order :]

    def _to_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            return pixels
        latents = self.vae.encode(pixels.to(self._vae_dtype())).latent_dist.mode()
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return ((latents - shift) * self.vae.config.scaling_factor).to(pixels.dtype)

    def _to_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            return latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = latents.to(self._vae_dtype()) / self.vae.config.scaling_factor + shift
        return self.vae.decode(latents, return_dict=False)[0]

    def _vae_dtype(self) -> torch.dtype:
        """The VAE's; one that overflows in float16 is brought to float32 first."""
        if self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False):
            self.vae.to(torch.float32)
        return self.vae.dtype

    def _to_images(self, pixels: torch.Tensor, output_type: str):
        return self.image_processor.postprocess(pixels.float().clamp(-1, 1), output_type=output_type)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"A picture of the mode {image.mode!r} does not say its range; give 8 or 16 bits, or an array."
        )
    if image.mode == "RGB":
        return image
    own = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", own.size, (255, 255, 255, 255)), own).convert("RGB")


def _is_bytes(image) -> bool:
    """Whether an array or a tensor holds bytes."""
    return str(getattr(image, "dtype", "")).endswith("uint8")


def caption_inputs(tokenizer, captions: list[str]) -> dict[str, torch.Tensor]:
    """What a refiner that embeds captions itself takes of them: ids and mask `(captions, tokens)`."""
    rows = [tokenizer(own, add_special_tokens=False).input_ids for own in captions]
    length = max(map(len, rows))
    ids = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    shape = (len(rows), length)
    return {
        "caption_ids": torch.tensor(ids, dtype=torch.long).view(shape),
        "caption_mask": torch.tensor(mask, dtype=torch.long).view(shape),
    }


def _resized(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Pixels of the result's size."""
    if factor == 1:
        return pixels
    return F.interpolate(pixels, scale_factor=factor, mode="bicubic", align_corners=False).clamp(-1, 1)


def register_with_diffusers() -> None:
    """Let diffusers find the classes by the package's name, in local folders and on the Hub. May be called again."""
    import diffusers
    from diffusers.pipelines import pipeline_loading_utils as loading

    library = __name__.split(".")[0]
    known = {name: ["save_pretrained", "from_pretrained"] for name in ("NextFlowRefinerModel", "NextFlowVQModel")}
    loading.LOADABLE_CLASSES.setdefault(library, {}).update(known)
    loading.ALL_IMPORTABLE_CLASSES.update(known)
    # `DiffusionPipeline.from_pretrained` and `AutoModel.from_pretrained` look classes up there.
    diffusers.NextFlowRefinerPipeline = NextFlowRefinerPipeline
    diffusers.NextFlowRefinerModel = NextFlowRefinerModel


register_with_diffusers()
