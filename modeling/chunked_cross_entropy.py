"""Cross-entropy of a linear head over a large vocabulary, without ever holding all rows' logits.

At 184,832 entries and 10,084 slots, one image's logits alone are 7.5 GB in float32. Here a chunk of rows is scored at a
time, in the forward pass for the losses and once more in the backward pass for the gradients, which go straight into
one buffer for the head's weight. Under autocast the products are taken in its type, and a weight of another type is
cast block by block, never whole.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Logits held at a time: 256 MiB in float32.
CHUNK_ELEMENTS = 2**26
# Rows of the weight that are cast at a time.
CAST_ROWS = 2**14


def chunked_cross_entropy(head: nn.Module, hidden_states: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
    """Cross-entropy of each row.

    Args:
        head: The head, `(rows, hidden_size)` -> `(rows, vocab_size)`. A plain linear layer takes the lean path; one
            that is wrapped, sharded or offloaded is called as a module, chunk by chunk.
        hidden_states: `(rows, hidden_size)`.
        labels: `(rows,)`, each an entry of the vocabulary.

    Returns:
        float32 `(rows,)` (float64 for float64 inputs).
    """
    if is_plain(head, hidden_states):
        kind = hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(kind))
        if hidden_states.dtype in (head.weight.dtype, torch.bfloat16, torch.float16):
            with torch.autocast(kind, enabled=False):
                return _LinearCrossEntropy.apply(hidden_states, head.weight, labels)

    def of_chunk(rows, targets):
        return _losses(head(rows), targets)

    rows_at_once = max(1, CHUNK_ELEMENTS // head.out_features) if hasattr(head, "out_features") else 256
    if len(labels) <= rows_at_once:
        return of_chunk(hidden_states, labels)
    chunks = zip(hidden_states.split(rows_at_once), labels.split(rows_at_once))
    return torch.cat([checkpoint(of_chunk, rows, targets, use_reentrant=False) for rows, targets in chunks])


def chunked_log_probs(
    score: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    chosen: torch.LongTensor,
    temperature: float,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each choice, and the entropy of its distribution, a chunk of rows at a time.

    Args:
        score: `(rows, hidden_size)` -> `(rows, size)`; -inf for what cannot be chosen.
        hidden_states: `(rows, hidden_size)`.
        chosen: `(rows,)`.
        temperature: Divides the scores.
        size: How many choices there are.

    Returns:
        Two of `(rows,)`.
    """

    def of_chunk(rows, own):
        log_probs = (score(rows) / temperature).log_softmax(dim=-1)
        # What cannot be chosen adds nothing: 0 instead of 0 times infinity.
        entropies = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=-1)
        return log_probs.gather(-1, own[:, None])[:, 0], entropies

    rows_at_once = max(1, CHUNK_ELEMENTS // size)
    if len(chosen) <= rows_at_once:
        return of_chunk(hidden_states, chosen)
    chunks = zip(hidden_states.split(rows_at_once), chosen.split(rows_at_once))
    parts = [checkpoint(of_chunk, rows, own, use_reentrant=False) for rows, own in chunks]
    return tuple(torch.cat(own) for own in zip(*parts))


def is_plain(head: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether a head is a linear layer whose weight may be used without calling it: not wrapped, sharded, offloaded."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (nn.Parameter, torch.Tensor)
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
        and head.weight.device == hidden_states.device
    )


def _losses(logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
    return F.cross_entropy(_widen(logits), labels, reduction="none")


def _widen(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _blocks(weight: torch.Tensor, dtype: torch.dtype):
    """The weight in `dtype` as (first row, rows): all at once where it has that type, else cast a block at a time."""
    size = len(weight) if weight.dtype == dtype else CAST_ROWS
    return ((first, weight[first : first + size].to(dtype)) for first in range(0, len(weight), size))


def _logits(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    parts = [_widen(rows @ block.T) for _, block in _blocks(weight, rows.dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, labels):
        ctx.rows = max(1, CHUNK_ELEMENTS // len(weight))
        losses, normalizers = [], []
        for rows, targets in zip(hidden_states.split(ctx.rows), labels.split(ctx.rows)):
            logits = _logits(rows, weight)
            normalizers.append(logits.logsumexp(dim=1))
            losses.append(normalizers[-1] - logits.gather(1, targets[:, None])[:, 0])
        if not losses:
            return _widen(hidden_states.new_zeros(0))
        ctx.save_for_backward(hidden_states, weight, labels, torch.cat(normalizers))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        if not ctx.saved_tensors:
            return None, None, None
        hidden_states, weight, labels, normalizers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for first in range(0, len(labels), ctx.rows):
            chosen = slice(first, first + ctx.rows)
            rows, targets = hidden_states[chosen], labels[chosen]
            grad_logits = _logits(rows, weight).sub_(normalizers[chosen, None]).exp_()
            grad_logits[torch.arange(len(targets), device=targets.device), targets] -= 1
            grad_logits = grad_logits.mul_(grad_losses[chosen, None]).to(rows.dtype)
            grad_rows = 0
            for first, block in _blocks(weight, rows.dtype):
                own = grad_logits[:, first : first + len(block)]
                if grad_hidden is not None:
                    grad_rows = grad_rows + own @ block
                if grad_weight is None:
                    continue
                if weight.dtype == rows.dtype:
                    grad_weight[first : first + len(block)].addmm_(own.T, rows)
                else:
                    grad_weight[first : first + len(block)] += own.T @ rows
            if grad_hidden is not None:
                grad_hidden[chosen] = grad_rows
        return grad_hidden, grad_weight, None
