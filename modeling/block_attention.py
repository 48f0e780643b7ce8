"""Attention run by run, without a mask: `attn_implementation="block_varlen"`.

A sequence of text and images is a row of *runs*: stretches of text, in which attention is causal, and blocks (the slots
of one scale), in which it goes both ways. A run attends to itself and to all that stands before it in its document, so
each is one dense call of scaled dot-product attention. Nothing is computed between documents that share a row, the
length of a row costs nothing by itself, and blocks need no mask, so that the fastest kernels take them.

Where FlashAttention for sequences of varying length is at hand, two calls do it for a whole batch: one for all blocks,
one for all stretches of text, each run beside a copy of the keys it sees. A call a run would leave most of an
accelerator idle, as most scales have a few slots; where copies would be too many (`MAX_COPIES`), it is that still.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, groupby
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK_VARLEN = "block_varlen"
# Copies of keys for each position, at most: a layer keeps them for its backward pass, and they grow with runs times
# length. Rows of one picture a document have 4 to 7; a document of ten pictures of 256 px 63, one of forty 258.
MAX_COPIES = 16


class Run(NamedTuple):
    """Positions `start` to `end` of a row, which attend to the row from `document_start` on."""

    start: int
    end: int
    document_start: int
    causal: bool


def find_runs(block_ids: torch.LongTensor, document_ids: torch.LongTensor) -> list[list[Run]]:
    """Runs of each row.

    Args:
        block_ids: `(batch, length)` block of each position, -1 for causal ones.
        document_ids: `(batch, length)` document of each position, -1 for padding. A document is contiguous.
    """
    rows = []
    for blocks, documents in zip(block_ids.cpu(), document_ids.cpu()):
        pairs = torch.stack([documents, blocks])
        # Not `unique_consecutive`, which takes milliseconds, in which an accelerator has nothing to do.
        starts = F.pad((pairs.diff() != 0).any(dim=0), (1, 0), value=True).nonzero()[:, 0]
        pairs, lengths = pairs[:, starts], F.pad(starts, (0, 1), value=pairs.shape[1]).diff()
        runs, start, document_start, last_document = [], 0, 0, None
        for (document, block), length in zip(pairs.T.tolist(), lengths.tolist()):
            if document != last_document:
                document_start, last_document = start, document
            if document >= 0:
                runs.append(Run(start, start + length, document_start, block < 0))
            start += length
        rows.append(runs)
    return rows


class Call(NamedTuple):
    """What one kernel needs for all runs of a kind; ends are int32 `(runs + 1,)` and start with 0.

    Attributes:
        keys: Positions, in the batch's rows one behind the other, of all that each run sees: `(keys,)`.
        query_ends: Where each run ends in the queries.
        key_ends: Where each run's keys end.
        longest_run: Positions of the longest run.
        longest_past: Keys of the run that sees most.
    """

    keys: torch.LongTensor
    query_ends: torch.IntTensor
    key_ends: torch.IntTensor
    longest_run: int
    longest_past: int


class BatchRuns:
    """Runs of a batch, and what kernels need of them, made once for all layers.

    Args:
        rows: Runs of each row.
        length: Positions of a row.

    Attributes:
        sizes: Lengths of the pieces that the rows, one behind the other, fall into: runs, and padding between them.
        kinds: Of each piece whether it is causal; `None` for padding.
        at_once: Whether the keys that all runs see, each with its own copy, are few enough for a call of a kind.
    """

    def __init__(self, rows: list[list[Run]], length: int):
        self.rows = rows
        self.sizes, self.kinds, filled = [], [], 0
        self._runs: dict[bool, list[Run]] = {True: [], False: []}
        self._calls: dict[torch.device, dict[bool, Call]] = {}
        for row, runs in enumerate(rows):
            first = row * length
            for run in runs:
                self.sizes += [first + run.start - filled, run.end - run.start]
                self.kinds += [None, run.causal]
                filled = first + run.end
                self._runs[run.causal].append(Run(first + run.start, filled, first + run.document_start, run.causal))
        self.sizes.append(len(rows) * length - filled)
        self.kinds.append(None)
        copies = sum(run.end - run.document_start for runs in rows for run in runs)
        self.at_once = copies <= MAX_COPIES * len(rows) * length

    def calls(self, device: torch.device) -> dict[bool, Call]:
        """The call for causal runs and that for blocks, where there are any."""
        if device not in self._calls:
            self._calls[device] = {causal: _call_of(own, device) for causal, own in self._runs.items() if own}
        return self._calls[device]


def _call_of(runs: list[Run], device: torch.device) -> Call:
    lengths = [run.end - run.start for run in runs]
    pasts = [run.end - run.document_start for run in runs]
    keys = torch.cat([torch.arange(run.document_start, run.end) for run in runs])
    ends = (torch.tensor([0, *accumulate(own)], dtype=torch.int32).to(device) for own in (lengths, pasts))
    return Call(keys.to(device), *ends, max(lengths), max(pasts))


def block_varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    runs: BatchRuns | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of `(batch, heads, length, head_dim)` run by run; without `runs`, transformers' SDPA."""
    if runs is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    kwargs.pop("is_causal", None)
    # A static cache is longer than what it holds.
    key, value = (own if own.shape[2] == query.shape[2] else own[:, :, : query.shape[2]] for own in (key, value))
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # As SDPA does by itself: rotations have made queries and keys float32.
        query, key, value = (own.to(torch.get_autocast_dtype(kind)) for own in (query, key, value))
    return _attend(module, query, key, value, runs, scaling=scaling, dropout=dropout, **kwargs), None


# Its loops over runs are not for a compiler; what stands around it in a layer is.
@torch.compiler.disable
def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: BatchRuns,
    scaling: float | None,
    dropout: float,
    **kwargs,
) -> torch.Tensor:
    """All rows, with zeros for padding: `(batch, length, heads, head_dim)`."""
    if runs.at_once and _takes_many_runs(query, key, value):
        return _attend_at_once(query, key, value, runs, dropout, scaling)
    attend = partial(sdpa_attention_forward, module, scaling=scaling, dropout=dropout, **kwargs)
    # Split everywhere, not sliced: the gradient of a slice is filled up to all that it was cut from, once a run.
    rows = zip(query.split(1), key.split(1), value.split(1), runs.rows)
    return torch.cat([_attend_row(attend, *row) for row in rows])


def _takes_many_runs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention's kernels take these heads; `torch.nn.attention.sdpa_kernel` can rule them out."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] % 8 == 0
        # Larger heads have no backward pass on some cards.
        and query.shape[-1] <= 192
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.backends.cuda.is_flash_attention_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: BatchRuns, dropout: float, scaling: float | None
) -> torch.Tensor:
    """All rows, with zeros for padding: `(batch, length, heads, head_dim)`."""
    batch, _, length, _ = query.shape
    query, key, value = (own.transpose(1, 2).flatten(0, 1) for own in (query, key, value))
    # Split and put together by pieces, not picked by index: the gradient of that would be added up row by row.
    pieces = query.split(runs.sizes)
    outputs = [piece.new_zeros(piece.shape) if kind is None else None for piece, kind in zip(pieces, runs.kinds)]
    for causal, call in runs.calls(query.device).items():
        places = [place for place, kind in enumerate(runs.kinds) if kind is causal]
        seen = (own.index_select(0, call.keys) for own in (key, value))
        output = _flash_attention(torch.cat([pieces[place] for place in places]), *seen, call, causal, dropout, scaling)
        for place, own in zip(places, output.split([runs.sizes[place] for place in places])):
            outputs[place] = own
    return torch.cat(outputs).unflatten(0, (batch, length))


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    causal: bool,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Each run with its keys, `(positions, heads, head_dim)`; a causal run's last query sees all of them."""
    # Not `torch.nn.attention.varlen`, whose signature changes from release to release.
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        call.query_ends,
        call.key_ends,
        call.longest_run,
        call.longest_past,
        dropout,
        causal,
        False,
        scale=scaling,
    )[0]


def _attend_row(
    attend: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: list[Run]
) -> torch.Tensor:
    """Documents of a row, each on its own, and zeros for padding: `(1, length, heads, head_dim)`."""
    documents, sizes, filled = [], [], 0
    for start, own in groupby(runs, key=attrgetter("document_start")):
        own = list(own)
        documents += [None, own]
        sizes += [start - filled, own[-1].end - start]
        filled = own[-1].end
    documents.append(None)
    sizes.append(query.shape[2] - filled)
    parts = zip(documents, query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2))
    outputs = [
        queries.new_zeros(queries.transpose(1, 2).shape)
        if own is None
        else _attend_document(attend, queries, keys, values, own)
        for own, queries, keys, values in parts
    ]
    return torch.cat(outputs, dim=1)


def _attend_document(
    attend: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: list[Run]
) -> torch.Tensor:
    """The runs of a document, from its last to its first, so that what each sees is cut from what the next one saw."""
    outputs = []
    for run, queries in zip(reversed(runs), reversed(query.split([run.end - run.start for run in runs], dim=2))):
        opens_document, seen = run.start == run.document_start, run.end - run.document_start
        key, value = key[:, :, :seen], value[:, :, :seen]
        mask = None
        if run.causal and not opens_document:
            mask = _causal_tail(run.end - run.start, seen, query.device)
        output, _ = attend(queries, key, value, mask, is_causal=run.causal and opens_document)
        outputs.append(output)
    return torch.cat(outputs[::-1], dim=1)


def _causal_tail(queries: int, keys: int, device) -> torch.Tensor | None:
    """Mask of the last `queries` of `keys` positions; a single one sees all."""
    if queries == 1:
        return None
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


AttentionInterface.register(BLOCK_VARLEN, block_varlen_attention)
AttentionMaskInterface.register(BLOCK_VARLEN, sdpa_mask)
