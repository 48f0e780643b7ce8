"""Where the images of a sequence lie: slots, positions, blocks. The one place that knows it.

An image is `<boi>`, then for every scale k = 2..K a block of h_k * w_k slots, then `<eoi>`. The hidden state at
`<boi>` predicts the 1x1 scale, those of a block predict its scale. A sequence may stop after any whole block (a
*prefix*: an unfinished drawing, or training on coarse scales alone), may add one more block with the finest scale's own
grid, and an image that is only looked at may have that final block alone (`NextFlowConfig.context_image`): the number
of placeholders tells which.

Positions (NextFlow Eq 1): text at time t has (t, t, t); slot (i, j) of an h x w block k has
(t_boi + k - 1, C / sqrt(h w) * (i + 1/2), C / sqrt(h w) * (j + 1/2)); `<eoi>` follows at t_boi + number of blocks + 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import accumulate

import torch

from .configuration_nextflow import NextFlowConfig
from .scale_schedule import Grid, all_blocks, read_blocks


@dataclass(frozen=True)
class ImageSpan:
    """One image of a batch of sequences.

    Attributes:
        row: Row of the batch.
        start: Column of `<boi>`; the first slot of scale 2 follows it.
        grids: All scales of the picture.
        num_blocks: How many blocks of slots the sequence holds: K - 1 for a whole image, K with the final block.
        final_only: Whether the only block is the final one, so that the sequence predicts no code of the picture.
    """

    row: int
    start: int
    grids: tuple[Grid, ...]
    num_blocks: int
    final_only: bool = False

    @property
    def blocks(self) -> tuple[Grid, ...]:
        """Grids of the blocks in the sequence."""
        return self.grids[-1:] if self.final_only else all_blocks(self.grids)[: self.num_blocks]

    @property
    def num_slots(self) -> int:
        """Slots behind `<boi>`."""
        return sum(height * width for height, width in self.blocks)

    @property
    def num_predicted_scales(self) -> int:
        """Scales whose codes this sequence predicts, the 1x1 scale at `<boi>` included."""
        return 0 if self.final_only else min(self.num_blocks + 1, len(self.grids))

    @property
    def num_codes(self) -> int:
        """Codes that this sequence predicts."""
        return sum(height * width for height, width in self.grids[: self.num_predicted_scales])


@dataclass(frozen=True)
class SequenceLayout:
    """Positions and blocks of a batch of sequences.

    Attributes:
        spans: The images, in order of row and column.
        position_ids: float32 `(3, batch, length)`: time, row and column for the rotary sections.
        block_ids: int64 `(batch, length)`: the same number >= 0 for the slots of one block, -1 elsewhere.
        time_offsets: int64 `(batch,)`: how many positions more than ticks of time the row's images took.
    """

    spans: tuple[ImageSpan, ...]
    position_ids: torch.Tensor
    block_ids: torch.Tensor
    time_offsets: torch.Tensor


def block_positions(grid: Grid, position_range: float, device=None) -> torch.Tensor:
    """Spatial positions of an h x w block in raster order: float32 `(2, h * w)`, rows then columns (NextFlow Eq 1)."""
    height, width = grid
    step = position_range / math.sqrt(height * width)
    rows = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) * step
    columns = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) * step
    return torch.stack([rows.repeat_interleave(width), columns.repeat(height)])


def read_grids(image_grids: torch.Tensor) -> list[tuple[Grid, ...]]:
    """`(images, scales, 2)` padded with zeros -> the scales of each image."""
    return [tuple((h, w) for h, w in image if h > 0) for image in image_grids.tolist()]


def _on_cpu(function):
    """Tensors that a function makes are on the CPU, whatever the default device."""

    @wraps(function)
    def wrapped(*args, **kwargs):
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapped


@_on_cpu
def find_images(
    input_ids: torch.LongTensor, image_grids: Sequence[tuple[Grid, ...]], config: NextFlowConfig
) -> tuple[ImageSpan, ...]:
    """The images of a batch, matched with `image_grids` in order of row and column.

    Raises:
        ValueError: If images and grids differ in number, or placeholders end within a scale.
    """
    # Read where Python reads: a question to an accelerator for each image would take longer than its whole pass.
    input_ids = input_ids.cpu()
    is_slot = input_ids == config.image_token_id
    follows_slot = torch.nn.functional.pad(is_slot, (1, 0))[:, :-1]
    starts = (input_ids == config.boi_token_id).nonzero().tolist()
    if len(starts) != len(image_grids):
        raise ValueError(
            f"The sequences hold {len(starts)} begin-of-image tokens, but there are grids of {len(image_grids)} images."
        )
    if bool((is_slot & ~follows_slot).sum() > len(starts)):
        raise ValueError("Some image placeholders stand outside an image: each run must follow a begin-of-image token.")
    # The first column from each on that is no slot.
    length = input_ids.shape[1]
    columns = torch.where(is_slot, length, torch.arange(length))
    run_ends = torch.nn.functional.pad(columns, (0, 1), value=length).flip(1).cummin(dim=1).values.flip(1).tolist()
    spans, total_slots = [], 0
    for (row, start), grids in zip(starts, image_grids):
        num_slots = run_ends[row][start + 1] - start - 1
        found = read_blocks(num_slots, grids)
        if found is None:
            whole = list(accumulate(height * width for height, width in all_blocks(grids)))
            raise ValueError(
                f"Row {row} has {num_slots} image placeholders behind position {start}, which end within a scale of "
                f"{list(grids)}: {whole} would end with one."
            )
        spans.append(ImageSpan(row, start, grids, *found))
        total_slots += num_slots
    if total_slots != int(is_slot.sum()):
        raise ValueError(
            f"The sequences hold {int(is_slot.sum())} image placeholders, but their images account for {total_slots}."
        )
    return tuple(spans)


@_on_cpu
def layout_sequences(
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    image_grids: Sequence[tuple[Grid, ...]],
    config: NextFlowConfig,
    document_ids: torch.LongTensor | None = None,
    past_length: int = 0,
    past_offsets: torch.LongTensor | None = None,
) -> SequenceLayout:
    """Positions and blocks of `(batch, length)` sequences of text and images. Padding may stand on either side.

    Args:
        input_ids: `(batch, length)`.
        attention_mask: `(batch, past_length + length)`, 0 at padding.
        image_grids: Scales of each image, in order of row and column.
        config: The decoder's configuration.
        document_ids: `(batch, length)` for packed rows: positions start anew with every document.
        past_length: Positions that a cache holds of these sequences already.
        past_offsets: `(batch,)` how many ticks of time fewer they took.
    """
    device = input_ids.device
    # Everything is laid out on the CPU, and goes to an accelerator at once.
    input_ids = input_ids.cpu()
    spans = find_images(input_ids, image_grids, config)
    if document_ids is None:
        whole = (len(input_ids), past_length + input_ids.shape[1])
        valid = torch.ones(whole) if attention_mask is None else attention_mask.cpu()
        time = (valid.long().cumsum(1) - 1).clamp(min=0)[:, past_length:]
        if past_offsets is not None:
            time = time - past_offsets.cpu()[:, None]
        document_starts = torch.zeros_like(input_ids)
    else:
        document_starts = _document_starts(document_ids.cpu())
        time = torch.arange(input_ids.shape[1]) - document_starts

    # 1. An image takes one tick of time a block: what follows it in its document comes so much earlier.
    rows = torch.tensor([span.row for span in spans], dtype=torch.long)
    slots, blocks = (
        torch.tensor([getattr(span, name) for span in spans], dtype=torch.long) for name in ("num_slots", "num_blocks")
    )
    firsts = torch.tensor([span.start + 1 for span in spans], dtype=torch.long)
    saved = torch.zeros(len(input_ids), input_ids.shape[1] + 1, dtype=torch.long)
    saved.index_put_((rows, firsts + slots), slots - blocks, accumulate=True)
    time_offsets = saved.sum(dim=1)
    saved = saved.cumsum(dim=1)[:, :-1]
    time = time - (saved - saved.gather(1, document_starts))

    # 2. Slots have the time of their block, and a place in the picture.
    position_ids = time.float().expand(3, -1, -1).clone()
    block_ids = torch.full_like(input_ids, -1)
    if spans:
        templates = [_slot_template(span.blocks, config.position_range) for span in spans]
        offsets, numbers = (torch.cat(own, dim=-1) for own in zip(*templates))
        start_times = time[rows, firsts - 1].repeat_interleave(slots)
        within = torch.arange(len(numbers)) - (slots.cumsum(0) - slots).repeat_interleave(slots)
        places = rows.repeat_interleave(slots), firsts.repeat_interleave(slots) + within
        position_ids[:, *places] = torch.cat([offsets[:1] + start_times, offsets[1:]])
        block_ids[places] = numbers + (blocks.cumsum(0) - blocks).repeat_interleave(slots)
    return SequenceLayout(spans, position_ids.to(device), block_ids.to(device), time_offsets.to(device))


def cached_time_offsets(cache, rows: int) -> torch.LongTensor | None:
    """`(rows,)` how many positions more than ticks of time the pictures of a cache took; `None` without any."""
    offsets = getattr(cache, "time_offsets", None)
    if offsets is None or int(cache.get_seq_length()) == 0:
        return None
    # A prompt's cache may have been repeated for several answers.
    return offsets if len(offsets) == rows else offsets.repeat_interleave(rows // len(offsets))


def positions_in_documents(document_ids: torch.LongTensor) -> torch.LongTensor:
    """Position of each token within its own document: `(batch, length)`."""
    return torch.arange(document_ids.shape[1], device=document_ids.device) - _document_starts(document_ids)


def _document_starts(document_ids: torch.LongTensor) -> torch.LongTensor:
    """Column at which each token's document begins: `(batch, length)`."""
    columns = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    opens = torch.ones_like(document_ids, dtype=torch.bool)
    opens[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(opens, columns, 0).cummax(dim=1).values


@lru_cache(maxsize=256)
def _slot_template(blocks: tuple[Grid, ...], position_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (time counted from `<boi>`) and block numbers of the slots of one image."""
    offsets, numbers = [torch.empty(3, 0)], [torch.empty(0, dtype=torch.long)]
    for number, (height, width) in enumerate(blocks):
        time = torch.full((1, height * width), float(number + 1))
        offsets.append(torch.cat([time, block_positions((height, width), position_range)]))
        numbers.append(torch.full((height * width,), number))
    return torch.cat(offsets, dim=1), torch.cat(numbers)
