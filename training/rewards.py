"""Rewards for pictures, as TRL's reward functions: similarity to the prompt, and words read.

Every one is called with `prompts`, `drawn` (PIL pictures) and the dataset's columns, and returns a number per picture.
A mixture is a list of them with TRL's `reward_weights`.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor


class SimilarityReward:
    """Cosine similarity of picture and prompt in the space of a CLIP, SigLIP or PickScore model of transformers.

    Args:
        model: A Hub id or a folder, such as "openai/clip-vit-large-patch14" or "yuvalkirstain/PickScore_v1".
        processor: Where its processor is, if elsewhere.
        device: Where it runs.
        batch_size: Pictures at a time.
    """

    __name__ = "similarity"

    def __init__(self, model: str, processor: str | None = None, device: str = "cpu", batch_size: int = 32):
        self.model = AutoModel.from_pretrained(model).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(processor or model)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: list, drawn: list[Image.Image | None], **columns) -> list[float]:
        """Similarities in [-1, 1]; -1 where nothing was drawn."""
        scores = [-1.0] * len(drawn)
        places = [place for place, own in enumerate(drawn) if own is not None]
        for first in range(0, len(places), self.batch_size):
            chosen = places[first : first + self.batch_size]
            # SigLIP was trained with texts padded to their full length.
            inputs = self.processor(
                text=[last_words(prompts[place]) for place in chosen],
                images=[drawn[place] for place in chosen],
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).to(self.model.device)
            output = self.model(**inputs)
            similarity = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
            for place, own in zip(chosen, similarity.float().tolist()):
                scores[place] = own
        return scores


def ocr_score(read: Sequence[tuple[str, float]], wanted: Sequence[str]) -> float:
    """Completeness + similarity - penalty of words that were read in a picture (VAR-RL Eq 11 to 15).

    Args:
        read: Words and the reader's confidence in each, in [0, 1].
        wanted: Words that should be there.

    Returns:
        At most 2: all words there, with full confidence, and nothing else.

    Raises:
        ValueError: If no word is wanted.
    """
    if not wanted:
        raise ValueError("At least one word must be wanted.")
    read = [(word.lower(), confidence) for word, confidence in read]
    wanted = [word.lower() for word in wanted]
    found = [[confidence for word, confidence in read if word == own] for own in wanted]
    complete = sum(min(own) for own in found if own) / len(wanted)
    similar = 0.0
    for own in wanted:
        nearest = max(((letters_right(word, own), confidence) for word, confidence in read), default=(0.0, 0.0))
        similar += nearest[0] * nearest[1] / len(wanted)
    seen, asked = Counter("".join(word for word, _ in read)), Counter("".join(wanted))
    distance = ((seen - asked) + (asked - seen)).total()
    return complete + similar - 0.6 * distance / (seen.total() + asked.total())


def letters_right(found: str, wanted: str) -> float:
    """1 - edit distance (Levenshtein) / length of the longer text: 1 where both are the same, 0 where nothing is."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return 1 - row[-1] / max(len(found), len(wanted), 1)


def last_words(prompt: str | list[dict]) -> str:
    """The text of a prompt: of a conversation, its last user turn's."""
    if isinstance(prompt, str):
        return prompt
    content = next(own["content"] for own in reversed(prompt) if own["role"] == "user")
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")
