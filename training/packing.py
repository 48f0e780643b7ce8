"""Packing: several sequences in one row, so that no computation is spent on padding.

Bins of a fixed *length* balance memory: but a long picture costs more per token than a caption, so ranks that wait for
each other at every step still wait. Bins of a fixed *compute* (NextFlow section 3.3) hold the same floating-point
operations each, counted from what a sequence's runs really attend to.

transformers' and TRL's own packing takes positions that do not grow by one for document borders, which the positions of
pictures break; here a document id stands at every position (`NextFlowModel.forward`).
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..modeling.configuration_nextflow import NextFlowConfig
from ..modeling.scale_schedule import Grid, all_blocks, read_blocks
from .processes import all_processes
from .sequences import IGNORED, ids_of, pad_rows, stack_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bin:
    """Sequences that share a row.

    Attributes:
        items: The sequences, as `SequenceBuilder` makes them.
        size: Their summed size, in the packer's unit (tokens or FLOPs).
    """

    items: tuple[dict, ...]
    size: float


# A sequence and its size, in the packer's unit: counted once, as it takes a walk along the sequence.
Sized = tuple[float, dict]


class SequenceCost:
    """Floating-point operations of a forward pass over one sequence, attention run by run.

    Args:
        config: The decoder's configuration.
        attention_weight: What an operation of attention counts beside one of the matrix products. 1 counts what the
            paper counts. Where attention's kernels run at another rate than all the rest, bins of equal operations take
            unequal time; `benchmarks/packing.py` measures the weight at which operations tell the time.

    Raises:
        ValueError: If the weight is not positive.
    """

    def __init__(self, config: NextFlowConfig, attention_weight: float = 1.0):
        if not attention_weight > 0:
            raise ValueError(f"`attention_weight` must be positive, got {attention_weight}.")
        text = config.text_config
        head_dim = text.hidden_size // text.num_attention_heads
        kv_width = text.num_key_value_heads * head_dim
        projections = text.hidden_size * (2 * text.hidden_size + 2 * kv_width) + 3 * text.hidden_size * (
            text.intermediate_size
        )
        self.per_token = 2 * text.num_hidden_layers * projections
        self.per_pair = 4 * text.num_hidden_layers * text.hidden_size * attention_weight
        self.per_label = 2 * text.hidden_size * text.vocab_size
        self.image_token_id = config.image_token_id

    def __call__(self, item: dict) -> float:
        length = len(item["input_ids"])
        labels = sum(label != IGNORED for label in item["labels"]) + sum(
            label != IGNORED for own in item["image_labels"] for label in own
        )
        pairs = attended_pairs(item["input_ids"], item["grids"], self.image_token_id)
        return self.per_token * length + self.per_pair * pairs + self.per_label * labels


def attended_pairs(input_ids: list[int], grids: list[tuple[Grid, ...]], image_token_id: int) -> int:
    """(query, key) pairs of one document: all that stands before a run, and the run itself (half of it in text)."""
    pairs = position = 0
    images = iter(grids)
    while position < len(input_ids):
        end = position
        is_slot = input_ids[position] == image_token_id
        while end < len(input_ids) and (input_ids[end] == image_token_id) == is_slot:
            end += 1
        if is_slot:
            num_blocks, final_only = read_blocks(end - position, own := next(images))
            for height, width in own[-1:] if final_only else all_blocks(own)[:num_blocks]:
                pairs += height * width * (position + height * width)
                position += height * width
        else:
            pairs += (end - position) * (position + end + 1) // 2
            position = end
    return pairs


def tokens_of(item: dict) -> int:
    """Length of a sequence."""
    return len(item["input_ids"])


class PackedSequences(IterableDataset):
    """Bins of sequences, evenly filled from a window that moves along the data.

    Bins that a window leaves less than `min_fill` full are emptied into the next window. Neighbouring bins are of
    neighbouring size, so that ranks that take them in turn finish together.

    Args:
        sequences: The sequences, by number, in the order of training. Processes and their workers take turns.
        capacity: Size of a bin, in the unit of `size_of`.
        size_of: Size of a sequence: `tokens_of` for fixed length, a `SequenceCost` for fixed compute.
        max_tokens: Longest row, whatever its size: what memory allows.
        window: Sequences looked at together.
        min_fill: Share of the capacity at which a bin counts as full.
        max_oversized: Share of the sequences that may be left out, each with a warning, as they are larger than a bin.
        endless: Whether the sequences begin anew when they end, as a run that is resumed by skipping what it has seen
            needs: a loader that ends would begin with the first bin.

    Raises:
        ValueError: At iteration, if more sequences are larger than a bin, or an endless stream has none.
    """

    def __init__(
        self,
        sequences: Sequence[dict] | Dataset,
        capacity: float,
        size_of: Callable[[dict], float] = tokens_of,
        max_tokens: int | None = None,
        window: int = 256,
        min_fill: float = 0.9,
        max_oversized: float = 0.01,
        endless: bool = False,
    ):
        if capacity <= 0 or window < 1 or not 0 <= min_fill <= 1 or not 0 <= max_oversized <= 1:
            raise ValueError(
                "Packing needs a positive capacity, a window of at least one sequence, and shares in [0, 1] of filling "
                f"and of oversized sequences, got {capacity}, {window}, {min_fill}, {max_oversized}."
            )
        self.sequences, self.capacity, self.size_of = sequences, capacity, size_of
        self.max_tokens, self.window, self.min_fill = max_tokens, window, min_fill
        self.max_oversized, self.endless = max_oversized, endless
        # Asked here: a worker of a process cannot tell.
        processes = all_processes()
        self.process, self.processes = processes.process_index, processes.num_processes

    def __iter__(self) -> Iterator[Bin]:
        bins = self._bins()
        while (own := next(bins, None)) is not None:
            yield own
            yield from bins
            if not self.endless:
                return
            bins = self._bins()
        if self.endless:
            raise ValueError(f"Of {len(self.sequences)} sequences none is left for this process to pack.")

    def _own(self) -> Iterator[dict]:
        """The sequences that this process' worker takes in turn: it makes no others."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first, step = self.process * workers + number, self.processes * workers
        return (self.sequences[index] for index in range(first, len(self.sequences), step))

    def _bins(self) -> Iterator[Bin]:
        waiting: list[Sized] = []
        oversized = 0
        for seen, item in enumerate(self._own(), 1):
            size = self.size_of(item)
            if size <= self.capacity and (self.max_tokens is None or tokens_of(item) <= self.max_tokens):
                waiting.append((size, item))
            else:
                oversized += 1
                self._leave_out(size, item, oversized, seen)
            if len(waiting) >= self.window:
                full, waiting = self._pack(waiting)
                yield from full
                if len(waiting) >= self.window:
                    # Nothing but half-empty bins: waiting longer would not end.
                    yield from self._all(waiting)
                    waiting = []
        yield from self._all(waiting)

    def _leave_out(self, size: float, item: dict, oversized: int, seen: int) -> None:
        text = (
            f"Sequence {item.get('id')} of {tokens_of(item)} tokens and size {size:.3g} does not fit a bin of capacity "
            f"{self.capacity:.3g} and at most {self.max_tokens} tokens"
        )
        # By chance a stream may begin with one.
        if oversized > self.max_oversized * max(seen, self.window):
            raise ValueError(
                f"{text}, nor did {oversized - 1} of the {seen - 1} before it. Raise the capacity, or `max_oversized`."
            )
        logger.warning("%s, and is left out.", text)

    def _all(self, sized: list[Sized]) -> list[Bin]:
        bins, left = self._spread(sized, math.ceil)
        return [own for own, _ in bins] + (self._all(left) if left else [])

    def _pack(self, sized: list[Sized]) -> tuple[list[Bin], list[Sized]]:
        bins, left = self._spread(sized, math.floor)
        full = []
        for own, members in bins:
            if own.size >= self.min_fill * self.capacity or self._row_is_full(own):
                full.append(own)
            else:
                left.extend(members)
        return full, left

    def _spread(self, sized: list[Sized], rounding: Callable[[float], int]) -> tuple[list, list[Sized]]:
        """As many bins as all items fill on average, rounded so, and the items that fit into none of them."""
        share = sum(size for size, _ in sized) / self.capacity
        if self.max_tokens is not None:
            share = max(share, sum(tokens_of(item) for _, item in sized) / self.max_tokens)
        return spread_evenly(sized, max(1, rounding(share)), self.capacity, self.max_tokens)

    def _row_is_full(self, own: Bin) -> bool:
        return self.max_tokens is not None and sum(map(tokens_of, own.items)) >= self.min_fill * self.max_tokens


def spread_evenly(
    sized: list[Sized], num_bins: int, capacity: float, max_tokens: int | None = None
) -> tuple[list[tuple[Bin, list[Sized]]], list[Sized]]:
    """Put every item, largest first, into the emptiest bin that has room for it.

    Large and small sequences meet in every bin so: bins of equal compute are also of similar length.

    Returns:
        The bins that got items, fullest first, each with its sized items; and those that no bin has room for.
    """
    longest = float("inf") if max_tokens is None else max_tokens
    members: list[list[Sized]] = [[] for _ in range(num_bins)]
    sizes, lengths = [0.0] * num_bins, [0] * num_bins
    left = []
    for size, item in sorted(sized, key=lambda pair: -pair[0]):
        length = tokens_of(item)
        fitting = [
            index for index in range(num_bins) if sizes[index] + size <= capacity and lengths[index] + length <= longest
        ]
        if not fitting:
            left.append((size, item))
            continue
        emptiest = min(fitting, key=sizes.__getitem__)
        members[emptiest].append((size, item))
        sizes[emptiest] += size
        lengths[emptiest] += length
    bins = [(Bin(tuple(item for _, item in own), size), own) for own, size in zip(members, sizes) if own]
    return sorted(bins, key=lambda pair: -pair[0].size), left


def collate_packed(bins: list[Bin]) -> dict[str, torch.Tensor]:
    """One row per bin, padded on the right only where rows differ: `document_ids` tell documents and padding (-1)."""
    rows, labels, documents = [], [], []
    for own in bins:
        rows.append([token for item in own.items for token in item["input_ids"]])
        labels.append([label for item in own.items for label in item["labels"]])
        documents.append([number for number, item in enumerate(own.items) for _ in item["input_ids"]])
    batch = {
        "input_ids": pad_rows(rows, 0),
        "labels": pad_rows(labels, IGNORED),
        "document_ids": pad_rows(documents, -1),
    }
    items = [item for own in bins for item in own.items]
    return {**batch, **stack_images(items), **ids_of(items)}
