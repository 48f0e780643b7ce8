"""Conversations in the form that chat templates know, and the same conversations in words."""

from collections.abc import Iterable

# How a conversation in words says what a picture of it shows.
SHOWN = "a picture of {}. "
# Key of a picture's part of a turn, and of the words in its place: what it shows.
DESCRIPTION = "description"


def in_words(conversation: list[dict], descriptions: Iterable[str]) -> list[dict]:
    """A conversation with words in the place of its pictures.

    What a user shows becomes "a picture of ... ."; what the assistant draws becomes the words that ask for it. So a
    model that describes what it is shown can go on in words: a picture that would answer has its prompt for an answer.
    Such a part of a turn has what it says in `description` as well.

    Args:
        conversation: Turns as chat templates know them.
        descriptions: What each picture shows, in order.

    Raises:
        ValueError: If pictures and descriptions differ in number.
    """
    left = iter(descriptions)
    turns = []
    for turn in conversation:
        parts = [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]
        form = "{}" if turn["role"] == "assistant" else SHOWN
        told = []
        for part in parts:
            if "text" not in part:
                description = next(left, None)
                if description is None:
                    raise ValueError("The conversation has more pictures than descriptions were given.")
                part = {"type": "text", "text": form.format(description), DESCRIPTION: description}
            told.append(part)
        turns.append({**turn, "content": told})
    if next(left, None) is not None:
        raise ValueError("The conversation has fewer pictures than descriptions were given.")
    return turns
