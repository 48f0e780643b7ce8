"""Loading a checkpoint, drawing prompts and describing pictures: what the command line, demo and evaluation share."""

from tqdm.auto import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor

from . import MINI
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .processing.processing_nextflow import NextFlowProcessor
from .scenes import QUESTION


def load(checkpoint: str) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    """Model and processor of a checkpoint: "mini" (the bundled one), a folder or a Hub id."""
    path = MINI if checkpoint == "mini" else checkpoint
    return AutoModelForMultimodalLM.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


def draw_prompts(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    prompts: list[str],
    seeds: list[int],
    batch_size: int = 64,
    **sampling,
) -> list:
    """One PIL picture per prompt, each from its own seed; `sampling` goes to `generate`."""
    pictures = []
    for first in tqdm(range(0, len(prompts), batch_size), desc="draw"):
        chosen = slice(first, first + batch_size)
        messages = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in prompts[chosen]]
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        output = model.generate(**inputs, generation_mode="image", seed=seeds[chosen], **sampling)
        pictures += processor.post_process_multimodal_output(output, generation_mode="image")
    return pictures


def describe_pictures(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    pictures: list,
    question: str = QUESTION,
    batch_size: int = 64,
) -> list[str]:
    """The model's likeliest answer to a question about each picture (PIL, array or tensor)."""
    answers = []
    for first in tqdm(range(0, len(pictures), batch_size), desc="describe"):
        messages = [
            [{"role": "user", "content": [{"type": "image", "image": own}, {"type": "text", "text": question}]}]
            for own in pictures[first : first + batch_size]
        ]
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        output = model.generate(**inputs, max_new_tokens=80, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
