"""Attention run by run, without a mask: `attn_implementation="block_varlen"`.

A sequence of text and images is a row of *runs*: stretches of text, in which attention is causal, and blocks (the slots
of one scale), in which it goes both ways. A run attends to itself and to all that stands before it in its document, so
each is one dense call of scaled dot-product attention. Nothing is computed between documents that share a row, the
length of a row costs nothing by itself, and blocks need no mask, so that the fastest kernels take them.
"""

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
    rows = []
    for row, own in enumerate(runs):
        outputs, filled = [], 0
        for run in own:
            if run.start > filled:
                outputs.append(_padding(query, run.start - filled))
            queries, keys = slice(run.start, run.end), slice(run.document_start, run.end)
            opens_document = run.start == run.document_start
            mask = None
            if run.causal and not opens_document:
                mask = _causal_tail(run.end - run.start, run.end - run.document_start, query.device)
            output, _ = sdpa_attention_forward(
                module,
                query[row : row + 1, :, queries],
                key[row : row + 1, :, keys],
                value[row : row + 1, :, keys],
                mask,
                scaling=scaling,
                dropout=dropout,
                is_causal=run.causal and opens_document,
                **kwargs,
            )
            outputs.append(output)
            filled = run.end
        if filled < query.shape[2]:
            outputs.append(_padding(query, query.shape[2] - filled))
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows), None


def _padding(query: torch.Tensor, length: int) -> torch.Tensor:
    return query.new_zeros(1, length, query.shape[1], query.shape[3])


def _causal_tail(queries: int, keys: int, device) -> torch.Tensor | None:
    """Mask of the last `queries` of `keys` positions; a single one sees all."""
    if queries == 1:
        return None
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


AttentionInterface.register(BLOCK_VARLEN, block_varlen_attention)
AttentionMaskInterface.register(BLOCK_VARLEN, sdpa_mask)
