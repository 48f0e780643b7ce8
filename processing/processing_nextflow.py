"""Processor: text and pictures to tensors, and what the model makes back to text and pictures."""

import re

import numpy as np
import torch
from PIL import Image
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .image_processing_base_nextflow import NextFlowImageProcessorKwargs

# Qwen2.5's ChatML without a default system prompt. Every picture, drawn or given, stands between its own two tokens.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for item in content -%}
{%- if item['type'] == 'image' or 'image' in item or 'image_url' in item -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in item -%}{{ item['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- render(message['content']) + '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- render(message['content']) + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class NextFlowProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: NextFlowImageProcessorKwargs
    _defaults = {"text_kwargs": {"padding": False, "padding_side": "left"}}


class NextFlowProcessor(ProcessorMixin):
    r"""
    Joins an image processor and a text tokenizer.

    In text, a picture is `<|vision_start|><|image_pad|><|vision_end|>`; the placeholder is repeated for every slot of
    the scales from the second on.

    Args:
        image_processor ([`NextFlowImageProcessor`] or [`NextFlowImageProcessorPil`]): The image processor.
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with `image_token`, `boi_token` and `eoi_token`.
        chat_template (`str`, *optional*): Jinja template; ChatML by default.
        context_image (`str`, *optional*, defaults to `"scales"`): As in [`NextFlowConfig`]; `"scales+final"` adds
            placeholders for the block of final features.
    """

    valid_processor_kwargs = NextFlowProcessorKwargs

    def __init__(self, image_processor, tokenizer, chat_template=None, context_image: str = "scales", **kwargs):
        if context_image not in ("scales", "scales+final"):
            raise ValueError(f'`context_image` must be "scales" or "scales+final", got "{context_image}".')
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self.context_image = context_image
        self._special_tokens = re.compile("|".join(re.escape(token) for token in tokenizer.all_special_tokens))
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    def __call__(self, images=None, text=None, **kwargs):
        """Text with pictures -> tensors for the model, as in transformers.

        Raises:
            ValueError: If a prompt is empty, or text and pictures do not fit.
        """
        prompts = [text] if isinstance(text, str) else list(text or ())
        for index, own in enumerate(prompts):
            if not own.strip():
                raise ValueError(f"Prompt {index} is empty: say what to draw or to answer.")
        placeholders = sum(own.count(self.image_token) for own in prompts)
        pictures = _count(images)
        if prompts and placeholders != pictures:
            raise ValueError(
                f"The text has places for {placeholders} pictures ({self.image_token!r}), but {pictures} were given."
            )
        return super().__call__(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Placeholders of one picture: one for every slot."""
        return self.image_token * self._num_slots(np.asarray(image_inputs["image_grids"][image_idx]))

    def _num_slots(self, grids) -> int:
        cells = [int(height) * int(width) for height, width in grids if height]
        return sum(cells[1:]) + (cells[-1] if self.context_image == "scales+final" else 0)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As in transformers; refuses special tokens typed into a turn, which would silently change the sequence.

        Raises:
            ValueError: If a turn is empty or its text holds a special token.
        """
        for text in _texts_of(conversation):
            found = self._special_tokens.search(text)
            if found:
                raise ValueError(
                    f"The text of a turn holds the special token {found[0]!r}. Give pictures as content items "
                    '({"type": "image", "image": ...}) and leave turns to the chat template.'
                )
        processor_kwargs = {"padding": True, **(kwargs.pop("processor_kwargs", None) or {})}
        return super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens=True, generation_mode=None, **kwargs
    ):
        """What `generate` returned, as text and pictures.

        Args:
            generated_outputs: Token ids for `"text"`; for `"image"` the output of `generate` in that mode, or pixels
                `(pictures, 3, height, width)` in [-1, 1], or a list of `(3, height, width)`; for `"interleaved"` the
                output of `generate` in that mode.
            skip_special_tokens: Whether to leave special tokens out of text.
            generation_mode: `"text"` (default), `"image"` or `"interleaved"`.

        Returns:
            `list[str]`, `list[PIL.Image.Image]`, or for `"interleaved"` one list of both per prompt.

        Raises:
            ValueError: If the mode is unknown or pixels are not finite.
        """
        if generation_mode in (None, "text"):
            return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        if generation_mode == "image":
            return [to_picture(image) for image in getattr(generated_outputs, "images", generated_outputs)]
        if generation_mode == "interleaved":
            return [
                [
                    to_picture(segment)
                    if segment.is_floating_point()
                    else self.decode(segment, skip_special_tokens=skip_special_tokens, **kwargs)
                    for segment in row
                ]
                for row in generated_outputs.segments
            ]
        raise ValueError(f'`generation_mode` must be "text", "image" or "interleaved", got {generation_mode!r}.')

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Placeholders that pictures of these (height, width) take."""
        if image_sizes is None:
            return MultiModalData()
        slots = [
            self._num_slots(self.image_processor.bucket_of(height, width, kwargs.get("resolution")))
            for height, width in image_sizes
        ]
        return MultiModalData(num_image_tokens=slots, num_image_patches=[1] * len(slots))


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """Pixels `(3, height, width)` in [-1, 1] -> a picture.

    Raises:
        ValueError: If the shape is another, or a pixel is not finite.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"Expected pixels of shape (3, height, width), got {tuple(pixels.shape)}.")
    if not torch.isfinite(pixels).all():
        raise ValueError("The pixels hold NaN or infinite values; the model's weights or its dtype are at fault.")
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _count(images) -> int:
    """Pictures in any nesting of lists; an array of four dimensions is a batch of them."""
    if images is None:
        return 0
    if isinstance(images, (list, tuple)):
        return sum(map(_count, images))
    return len(images) if getattr(images, "ndim", 3) == 4 else 1


def _texts_of(conversation):
    """All text in one conversation or a batch of them."""
    conversations = conversation if conversation and isinstance(conversation[0], (list, tuple)) else [conversation]
    for messages in conversations:
        for message in getattr(messages, "messages", messages):
            content = message["content"]
            if not content:
                raise ValueError(f"A turn of the {message['role']} is empty.")
            for item in [content] if isinstance(content, str) else content:
                yield item if isinstance(item, str) else item.get("text") or ""


__all__ = ["NextFlowProcessor"]
