"""Attention run by run, without a mask: `attn_implementation="block_varlen"`.

A sequence of text and images is a row of *runs*: stretches of text, in which attention is causal, and blocks (the slots
of one scale), in which it goes both ways. A run attends to itself and to all that stands before it in its document, so
each is one dense call of scaled dot-product attention. Nothing is computed between documents that share a row, the
length of a row costs nothing by itself, and blocks need no mask, so that the fastest kernels take them.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK_VARLEN = "block_varlen"


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
        pairs, lengths = torch.unique_consecutive(torch.stack([documents, blocks]), dim=1, return_counts=True)
        runs, start, document_start, last_document = [], 0, 0, None
        for (document, block), length in zip(pairs.T.tolist(), lengths.tolist()):
            if document != last_document:
                document_start, last_document = start, document
            if document >= 0:
                runs.append(Run(start, start + length, document_start, block < 0))
            start += length
        rows.append(runs)
    return rows


def block_varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    runs: list[list[Run]] | None = None,
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
    attend = partial(sdpa_attention_forward, module, scaling=scaling, dropout=dropout, **kwargs)
    # Split everywhere, not sliced: the gradient of a slice is filled up to all that it was cut from, once a run.
    rows = zip(query.split(1), key.split(1), value.split(1), runs)
    return torch.cat([_attend_row(attend, *row) for row in rows]), None


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
