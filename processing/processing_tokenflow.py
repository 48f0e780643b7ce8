"""Processor of TokenFlow's text-to-image model: a prompt to tensors, and pixels back to a picture."""

from collections.abc import Sequence

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .processing_nextflow import to_picture


class TokenFlowProcessor(ProcessorMixin):
    r"""
    Turns prompts into what [`TokenFlowForImageGeneration`] draws from: the prompt's tokens, then those of `<img>`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer, Llama 2's with a token for every code.
        image_start_ids (`Sequence[int]`): Ids of `<img>`, as in the model's configuration.
        prompt_length (`int`, *optional*, defaults to 128): Most tokens of a prompt, as in the model's configuration.
    """

    def __init__(self, tokenizer, image_start_ids: Sequence[int] = (), prompt_length: int = 128, **kwargs):
        if not image_start_ids:
            raise ValueError("`image_start_ids` must name the ids of <img>.")
        self.image_start_ids = list(image_start_ids)
        self.prompt_length = prompt_length
        super().__init__(tokenizer, **kwargs)

    def __call__(self, text=None, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """Prompts -> `input_ids` and `attention_mask` `(batch, length)`, padded on the left.

        Raises:
            ValueError: If there is no prompt, one is empty, or one is longer than the model takes.
        """
        prompts = [text] if isinstance(text, str) else text
        if not (isinstance(prompts, (list, tuple)) and prompts and all(isinstance(own, str) for own in prompts)):
            raise ValueError("`text` must be a string or a list of at least one string.")
        if kwargs.pop("images", None) is not None:
            raise ValueError("This model draws from text alone; it takes no pictures.")
        ids = []
        for index, own in enumerate(prompts):
            if not own.strip():
                raise ValueError(f"Prompt {index} is empty: say what to draw.")
            # Whether a Llama tokenizer begins with <s> by itself depends on its file.
            tokens = [self.tokenizer.bos_token_id, *self.tokenizer(own, add_special_tokens=False).input_ids]
            if len(tokens) > self.prompt_length:
                raise ValueError(
                    f"Prompt {index} has {len(tokens)} tokens, and the model takes {self.prompt_length}; shorten it."
                )
            ids.append([*tokens, *self.image_start_ids])
        return self.tokenizer.pad({"input_ids": ids}, padding=True, padding_side="left", return_tensors=return_tensors)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs) -> BatchFeature:
        """One user's turn of text per prompt, as other models' processors take it.

        Raises:
            ValueError: If a conversation holds more than that.
        """
        batch = [conversation] if conversation and isinstance(conversation[0], dict) else conversation
        return self([_prompt_of(messages) for messages in batch or ()], return_tensors=kwargs.get("return_tensors"))

    def post_process_multimodal_output(self, generated_outputs, generation_mode=None, **kwargs) -> list:
        """The pictures (`PIL.Image.Image`) that `generate` drew, or that pixels `(3, height, width)` show."""
        return [to_picture(image) for image in getattr(generated_outputs, "images", generated_outputs)]


def _prompt_of(messages) -> str:
    content = messages[0].get("content") if len(messages) == 1 and messages[0].get("role") == "user" else None
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(own.get("type") == "text" for own in content):
        return "".join(own["text"] for own in content)
    raise ValueError("This model draws from one user's turn of text; it takes no pictures and no earlier turns.")


__all__ = ["TokenFlowProcessor"]
