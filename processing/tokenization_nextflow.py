"""Text tokenizers: Qwen2.5's for the 7B, and a small byte-level BPE of the same kind for mini."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# In the order of their ids in the small tokenizer.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# Names under which transformers exposes them: `tokenizer.image_token`, `tokenizer.image_token_id`, ...
NAMED_TOKENS = {"boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>", "image_token": "<|image_pad|>"}
# Qwen2.5's pre-tokenizer: contractions, words with their space, single digits, punctuation, line ends.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, min_frequency: int = 0) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of Qwen2.5's kind.

    Args:
        texts: What to learn merges from.
        vocab_size: Tokens in all, at most: 256 bytes, the special tokens and merges.
        min_frequency: How often a pair must stand in the texts to be merged.

    Raises:
        ValueError: If `vocab_size` leaves no room for the bytes and special tokens.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"A byte-level vocabulary needs at least {least} tokens, got vocab_size={vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=NAMED_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def qwen_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """Qwen2.5's tokenizer with its vision tokens under the names that the processor uses.

    Raises:
        ValueError: If a needed token is missing.
    """
    # Looked for before the tokens get their names: naming a token that is missing would add it as a new one.
    vocabulary = AutoTokenizer.from_pretrained(path_or_id).get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(f"The tokenizer {path_or_id!r} lacks {missing}; NextFlow needs Qwen2.5's special tokens.")
    return AutoTokenizer.from_pretrained(path_or_id, extra_special_tokens=NAMED_TOKENS, padding_side="left")
