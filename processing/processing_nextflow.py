"""Processor: text and pictures to tensors, and what the model makes back to text and pictures."""

import re

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .image_processing_base_nextflow import NextFlowImageProcessorKwargs

# As in NextFlowConfig.
_CONTEXT_IMAGES = ("scales", "scales+final", "final")
# Qwen2.5's ChatML without a default system prompt, and Qwen3's switch for thinking, off where it is not named. Every
# picture, drawn or given, stands between its own two tokens.
THINK_OPENING = "<think>\n"
THINK_CLOSING = "</think>\n"
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
{%- if enable_thinking is defined and enable_thinking -%}
{{- '<think>\\n' -}}
{%- endif -%}
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
        context_image (`str`, *optional*, defaults to `"scales"`): As in [`NextFlowConfig`]: a picture gets
            placeholders for its scales, for these and the block of final features, or for the latter alone.
    """

    valid_processor_kwargs = NextFlowProcessorKwargs

    def __init__(self, image_processor, tokenizer, chat_template=None, context_image: str = "scales", **kwargs):
        if context_image not in _CONTEXT_IMAGES:
            raise ValueError(f'`context_image` must be one of {_CONTEXT_IMAGES}, got "{context_image}".')
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self.context_image = context_image
        # Also those without a name, such as Qwen2.5's <|video_pad|>.
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted({*special, *tokenizer.all_special_tokens})
        self._special_tokens = re.compile("|".join(re.escape(token) for token in special))
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    def __call__(self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """Text with pictures -> tensors for the model, as in transformers.

        Raises:
            ValueError: If a prompt is empty or no valid Unicode, or text and pictures do not fit.
        """
        prompts = [text] if isinstance(text, str) else text
        if prompts is not None and not (
            isinstance(prompts, (list, tuple)) and prompts and all(isinstance(own, str) for own in prompts)
        ):
            raise ValueError("`text` must be a string or a list of at least one string.")
        prompts = list(prompts or ())
        for index, own in enumerate(prompts):
            if not own.strip():
                raise ValueError(f"Prompt {index} is empty: say what to draw or to answer.")
            try:
                own.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"Prompt {index} is no valid Unicode: {error}") from error
        placeholders = [own.count(self.image_token) for own in prompts]
        pictures = _count(images)
        if prompts and sum(placeholders) != pictures:
            raise ValueError(
                f"The text has places for {sum(placeholders)} pictures ({self.image_token!r}), "
                f"but {pictures} were given."
            )
        # With one list of pictures per prompt, equal totals could still show a prompt another one's pictures.
        if isinstance(images, (list, tuple)) and len(images) == len(prompts) > 1:
            for index, (places, own) in enumerate(zip(placeholders, images)):
                if isinstance(own, (list, tuple)) and places != _count(own):
                    raise ValueError(
                        f"Prompt {index} has places for {places} pictures ({self.image_token!r}), "
                        f"but {_count(own)} were given for it."
                    )
        return super().__call__(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Placeholders of one picture: one for every slot."""
        return self.image_token * self._num_slots(np.asarray(image_inputs["image_grids"][image_idx]))

    def _num_slots(self, grids) -> int:
        cells = [int(height) * int(width) for height, width in grids if height]
        scales = 0 if self.context_image == "final" else sum(cells[1:])
        return scales + (0 if self.context_image == "scales" else cells[-1])

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As in transformers; refuses what would silently change or shorten the sequence.

        Raises:
            ValueError: If there is no turn, a turn is empty or holds anything but text and pictures, or its text or
                role holds a special token.
        """
        for text in _texts_of(conversation):
            found = self._special_tokens.search(text)
            if found:
                raise ValueError(
                    f"The text of a turn holds the special token {found[0]!r}. Give pictures as content items "
                    '({"type": "image", "image": ...}) and leave turns to the chat template.'
                )
        processor_kwargs = {"padding": True, **(kwargs.pop("processor_kwargs", None) or {})}
        wants_masks = kwargs.pop("return_assistant_tokens_mask", False)
        inputs = super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)
        if wants_masks and isinstance(inputs, BatchFeature):
            inputs["assistant_masks"] = self._assistant_masks(inputs, conversation, chat_template, kwargs)
            return_tensors = kwargs.get("return_tensors")
            inputs.convert_to_tensors(tensor_type=None if return_tensors == "auto" else return_tensors)
        return inputs

    def _assistant_masks(self, inputs: BatchFeature, conversation, chat_template, kwargs: dict) -> list[list[int]]:
        """1 for every token that the assistant wrote, its pictures included; `(batch, length)`.

        transformers 5.17 looks for the turns where they stood before placeholders were repeated. So the text is
        masked as it was then, and every placeholder hands its own mask to all that it became.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in ("tokenize", "return_tensors")}
        kwargs |= {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        slots = iter([self._num_slots(np.asarray(grids)) for grids in inputs.get("image_grids", ())])
        masks = []
        for messages, ids in zip(_conversations(conversation), inputs["input_ids"]):
            short = self.tokenizer.apply_chat_template(
                getattr(messages, "messages", messages), chat_template=chat_template or self.chat_template, **kwargs
            )
            mask = []
            for token, own in zip(short["input_ids"], short["assistant_masks"]):
                mask += [own] * (next(slots) if token == self.image_token_id else 1)
            if len(mask) > len(ids):
                raise ValueError("Assistant masks and truncation do not go together.")
            padding = [0] * (len(ids) - len(mask))
            attended = inputs["attention_mask"][len(masks)]
            masks.append(padding + mask if attended[-1] else mask + padding)
        return masks

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
        ValueError: If the shape or dtype is another, or a pixel is not finite.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"Expected float pixels of shape (3, height, width), got {pixels.dtype} of {tuple(pixels.shape)}."
        )
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


def _conversations(conversation) -> list:
    """One conversation or a batch of them as a batch."""
    if not conversation:
        raise ValueError("The conversation has no turns.")
    is_batch = isinstance(conversation, (list, tuple)) and not isinstance(conversation[0], dict)
    return list(conversation) if is_batch else [conversation]


def _texts_of(conversation):
    """Text and roles of one conversation or a batch of them, as far as they stand side by side in the sequence."""
    for messages in _conversations(conversation):
        messages = getattr(messages, "messages", messages)
        if not messages:
            raise ValueError("A conversation has no turns.")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"A turn is a dict with a role and content, got {message!r}.")
            yield message["role"]
            content = message.get("content") or ""
            items = [{"text": content}] if isinstance(content, str) else content
            turn = "".join(map(_text_of, items))
            if not turn.strip():
                raise ValueError(f"A turn of the {message['role']} is empty.")
            yield turn


def _text_of(item) -> str:
    """Text of one item of a turn's content; a picture parts the texts around it."""
    if isinstance(item, dict):
        if item.get("type") == "image" or "image" in item or "image_url" in item:
            return "\0"
        if isinstance(item.get("text"), str):
            return item["text"]
    raise ValueError(f"A turn holds text and pictures, got the item {str(item)[:200]}.")


__all__ = ["NextFlowProcessor"]
