"""`pipeline("any-to-any")` without torchvision, and `pipeline("text-to-image")`, which a refiner may follow."""

import copy
from collections.abc import Sequence
from numbers import Integral

import torch
from transformers import AnyToAnyPipeline, GenerationConfig, Pipeline
from transformers.utils import ModelOutput

from .modeling.configuration_nextflow import NextFlowConfig
from .modeling.generation_nextflow import NextFlowImageOutput

# What `generate` takes in image mode, so that a pipeline's caller may name it directly.
_DRAWING_ARGUMENTS = (
    "image_size",
    "seed",
    "generator",
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
    "cache_implementation",
    "callback_on_scale_end",
    "streamer",
    "mask",
    "num_scales",
    "resampling",
    "best_of",
    "scorer",
    "use_cache",
)


class NextFlowAnyToAnyPipeline(AnyToAnyPipeline):
    """transformers' any-to-any pipeline; for NextFlow models it needs no torchvision.

    With a NextFlow model, `generation_mode="image"` treats plain text (or each of a list) as a user's turn, behind its
    `images`; `negative_prompt` and drawing arguments (`image_size`, `seed`, `guidance_scale`, ...) may be given by
    name. Other models are served as before.
    """

    def __init__(self, *args, **kwargs):
        self._is_nextflow = _is_nextflow(args, kwargs)
        if self._is_nextflow:
            # AnyToAnyPipeline.__init__ would demand torchvision, which our PIL image processor does without.
            Pipeline.__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)

    def _sanitize_parameters(self, generate_kwargs=None, generation_mode=None, **kwargs):
        if not self._is_nextflow or generation_mode in (None, "text"):
            return super()._sanitize_parameters(
                generate_kwargs=generate_kwargs, generation_mode=generation_mode, **kwargs
            )
        if generation_mode == "interleaved":
            raise ValueError(
                'An any-to-any pipeline answers with a text or with a picture (generation_mode="image"). Text and '
                "pictures in turn come from `nextflow_hf.inference.tell`, or from `generate` of the model with "
                'generation_mode="interleaved".'
            )
        drawing = {name: kwargs.pop(name) for name in _DRAWING_ARGUMENTS if name in kwargs}
        preprocess, forward, postprocess = super()._sanitize_parameters(
            generate_kwargs={**(generate_kwargs or {}), **drawing}, generation_mode=generation_mode, **kwargs
        )
        preprocess["as_chat"] = True
        return preprocess, forward, postprocess

    def preprocess(self, inputs=None, as_chat: bool = False, negative_prompt: str | None = None, **kwargs):
        if not as_chat:
            return super().preprocess(inputs, **kwargs)
        if kwargs:
            raise ValueError(
                f"An any-to-any pipeline that draws does not know {sorted(kwargs)}; it takes "
                f"{('negative_prompt', *_DRAWING_ARGUMENTS)}, and what else `generate` takes as `generate_kwargs`."
            )
        plain = {"text": inputs} if isinstance(inputs, (str, list)) else inputs
        if isinstance(plain, dict):
            model_inputs = {**_plain_inputs(self.processor, plain["text"], plain.get("images")), "text": plain["text"]}
        else:
            model_inputs = super().preprocess(inputs)
        if negative_prompt is not None:
            negative = _chat_inputs(self.processor, [(negative_prompt, ())] * len(model_inputs["input_ids"]))
            model_inputs["negative_prompt_ids"] = negative["input_ids"]
            model_inputs["negative_prompt_attention_mask"] = negative["attention_mask"]
        return model_inputs

    def _forward(self, model_inputs, generate_kwargs=None):
        generate_kwargs = dict(generate_kwargs or {})
        if isinstance(generate_kwargs.get("seed"), Integral):
            # Of every prompt, whatever the batch.
            generate_kwargs["seed"] = [generate_kwargs["seed"]] * len(model_inputs["input_ids"])
        outputs = super()._forward(model_inputs, generate_kwargs)
        if isinstance(outputs["generated_sequence"], NextFlowImageOutput):
            outputs["generated_sequence"] = _one_by_one(outputs["generated_sequence"])
        return outputs

    def postprocess(self, model_outputs, **kwargs):
        drawn = _as_list(model_outputs["generated_sequence"])
        # A pipeline makes plain outputs of ours.
        if isinstance(drawn[0], ModelOutput):
            together = NextFlowImageOutput(images=[image for own in drawn for image in own.images])
            model_outputs = {**model_outputs, "generated_sequence": together}
        return super().postprocess(model_outputs, **kwargs)

    def _prepare_generate_kwargs(self, generate_kwargs):
        if generate_kwargs.get("generation_mode", "text") != "text":
            return generate_kwargs
        return super()._prepare_generate_kwargs(generate_kwargs)


class TextToImagePipeline(Pipeline):
    """Draws pictures of prompts: `pipeline("text-to-image", model=...)("a red circle", seed=7)`.

    A string gives one `PIL.Image.Image`, a list of strings a list of them, drawn `batch_size` at a time. Keyword
    arguments are those of `generate` in image mode, and

    * `seed`: one number, from which every prompt is drawn, or a list with one per prompt;
    * `negative_prompt`: text that guidance leads away from;
    * `refiner`: "mini", a folder, a Hub id or a [`NextFlowRefinerPipeline`] that paints what was drawn anew, here or
      for every call where it is given to `pipeline(...)`; `drawing | refiner` is the same;
    * `refining`: what the refiner takes, such as `{"strength": 0.8, "num_inference_steps": 4, "upsampling": 2}`.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True
    default_generation_config = GenerationConfig()

    def __or__(self, refiner) -> "TextToImagePipeline":
        """This pipeline with a refiner behind it."""
        both = copy.copy(self)
        both._postprocess_params = {**self._postprocess_params, **self._refining(refiner, None)}
        return both

    def _refining(self, refiner, refining: dict | None) -> dict:
        """What `postprocess` takes of a refiner."""
        if refiner is None and refining is None:
            return {}
        # Here and not above: diffusers' pipelines take seconds to import.
        from .refining import check_refining, load_refiner

        own = {}
        if refiner is not None:
            own["refiner"] = load_refiner(refiner, self.model)
        if refining is not None:
            if refiner is None and "refiner" not in getattr(self, "_postprocess_params", {}):
                raise ValueError("`refining` is what a refiner takes; name one as `refiner`.")
            check_refining(refining)
            own["refining"] = refining
        return own

    def _sanitize_parameters(self, negative_prompt: str | None = None, refiner=None, refining=None, **kwargs):
        unknown = set(kwargs) - {*_DRAWING_ARGUMENTS, "generate_kwargs"}
        if unknown:
            raise ValueError(
                f"A text-to-image pipeline does not know {sorted(unknown)}; it takes "
                f"{('negative_prompt', 'refiner', 'refining', *_DRAWING_ARGUMENTS)}."
            )
        preprocess = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
        drawing = {**kwargs.pop("generate_kwargs", {}), **kwargs}
        after = self._refining(refiner, refining)
        if isinstance(drawing.get("generator"), torch.Generator):
            after["seed"] = _seed_of(drawing["generator"])
        if "seed" in drawing:
            preprocess["seed"] = drawing.pop("seed")
        return preprocess, drawing, after

    def __call__(self, inputs, *args, seed: int | Sequence[int] | None = None, **kwargs):
        """Draw; `seed` is one number for every prompt, or one per prompt."""
        if seed is None or isinstance(seed, Integral):
            return super().__call__(inputs, *args, **({} if seed is None else {"seed": seed}), **kwargs)
        prompts = inputs if isinstance(inputs, list) else [inputs]
        if len(seed) != len(prompts):
            raise ValueError(f"{len(seed)} seeds were given for {len(prompts)} prompts.")
        seeded = [{"prompt": prompt, "seed": own} for prompt, own in zip(prompts, seed)]
        return super().__call__(seeded if isinstance(inputs, list) else seeded[0], *args, **kwargs)

    def preprocess(self, prompt: str | dict, negative_prompt: str | None = None, seed: int | None = None):
        if isinstance(prompt, dict):
            prompt, seed = prompt["prompt"], prompt["seed"]
        inputs = {**_chat_inputs(self.processor, [(prompt, ())]), "prompt": prompt}
        if seed is not None:
            inputs["seed"] = int(seed)
        if negative_prompt is not None:
            negative = _chat_inputs(self.processor, [(negative_prompt, ())])
            inputs["negative_prompt_ids"] = negative["input_ids"]
            inputs["negative_prompt_attention_mask"] = negative["attention_mask"]
        return inputs

    def _forward(self, model_inputs, **drawing):
        prompts, seeds = _as_list(model_inputs.pop("prompt")), model_inputs.pop("seed", None)
        if seeds is not None:
            drawing["seed"] = seeds = _as_list(seeds)
        output = self.model.generate(**model_inputs, generation_mode="image", **drawing)
        return {"output": _one_by_one(output), "prompt": prompts, "seed": seeds}

    def postprocess(self, model_outputs, refiner=None, refining: dict | None = None, seed: int | None = None):
        ((output,), prompts, seeds) = (_as_list(model_outputs[name]) for name in ("output", "prompt", "seed"))
        if refiner is None:
            return self.processor.post_process_multimodal_output(output, generation_mode="image")[0]
        from .refining import refine_drawn

        if seeds == [None]:
            seeds = None if seed is None else [seed]
        return refine_drawn(refiner, output, prompts, seeds, **(refining or {}))[0]


def _seed_of(generator: torch.Generator) -> int:
    """A seed for what follows drawing; the generator is left as it is."""
    return torch.randint(2**62, (), generator=generator.clone_state(), device=generator.device).item()


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _one_by_one(output: NextFlowImageOutput) -> list[NextFlowImageOutput]:
    """What was drawn as a list, by which a pipeline takes a batch apart."""
    return [
        NextFlowImageOutput(images=[image], codes=[codes], grids=[grids])
        for image, codes, grids in zip(output.images, output.codes, output.grids)
    ]


def _plain_inputs(processor, text: str | list[str], images=None) -> dict:
    """A prompt with the pictures it speaks of, or several with the picture or pictures of each."""
    if isinstance(text, str):
        return _chat_inputs(processor, [(text, [] if images is None else _listed(images))])
    images = [None] * len(text) if images is None else _listed(images)
    if len(images) != len(text):
        raise ValueError(f"Pictures for {len(images)} prompts were given with {len(text)} prompts.")
    return _chat_inputs(processor, [(one, [] if own is None else _listed(own)) for one, own in zip(text, images)])


def _listed(images) -> list:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _chat_inputs(processor, prompts: list[tuple]) -> dict:
    """Prompts, each behind the pictures it speaks of, as users' turns that await an answer."""
    conversations = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": own} for own in images), {"type": "text", "text": text}],
            }
        ]
        for text, images in prompts
    ]
    return dict(
        processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
    )


def _is_nextflow(args, kwargs) -> bool:
    model = kwargs.get("model", args[0] if args else None)
    return isinstance(getattr(model, "config", None), NextFlowConfig)
