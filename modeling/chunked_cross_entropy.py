"""Cross-entropy of a linear head over a large vocabulary, without ever holding all rows' logits.

At 184,832 entries and 10,084 slots, one image's logits alone are 7.5 GB in float32. Here a chunk of rows is scored at a
time, and its gradients are taken at once, in the forward pass: a backward pass would have to score it again, a quarter
of the head's products. They go straight into one buffer for the head's weight. Under autocast the products are taken in
its type, and a weight of another type is cast block by block, never whole. Where a plain head is compiled
(`head.compile()`), what is done to its logits is one kernel, too.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Logits held in float32 at a time: 256 MiB.
CHUNK_ELEMENTS = 2**26
# Logits held at a time on an accelerator, 1 GiB in bfloat16: its products of fewer rows wait for the head's weight.
ACCELERATOR_CHUNK_ELEMENTS = 2**29
# Rows of the weight that are cast at a time.
CAST_ROWS = 2**14


@torch.compiler.disable
def chunked_cross_entropy(
    head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.LongTensor,
    weights: torch.Tensor,
    sizes: Sequence[int] | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Weighted sums of the rows' cross-entropies.

    Args:
        head: The head, `(rows, hidden_size)` -> `(rows, vocab_size)`. A plain linear layer takes the lean path; one
            that is wrapped, sharded or offloaded is called as a module, chunk by chunk.
        hidden_states: `(rows, hidden_size)`.
        labels: `(rows,)`, each an entry of the vocabulary.
        weights: `(rows,)`, of the losses in the sums; they get no gradient.
        sizes: Rows of each group that is summed by itself; by default all are one.

    Returns:
        The groups' sums, and the single rows' losses `(rows,)`, which have no gradient; all in float32 (float64 for
        float64 inputs).
    """
    sizes = [len(labels)] if sizes is None else list(sizes)
    if is_plain(head, hidden_states):
        kind = hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(kind))
        if hidden_states.dtype in (head.weight.dtype, torch.bfloat16, torch.float16):
            groups = zip(hidden_states.split(sizes), labels.split(sizes), weights.split(sizes))
            with torch.autocast(kind, enabled=False):
                settings = head._compiled_call_impl is not None, torch.is_grad_enabled()
                results = [
                    _LinearCrossEntropy.apply(rows, head.weight, targets, own, *settings)
                    for rows, targets, own in groups
                ]
            return tuple(total for total, _ in results), torch.cat([losses for _, losses in results])

    def of_chunk(rows, targets):
        return F.cross_entropy(_widen(head(rows)), targets, reduction="none")

    rows_at_once = max(1, CHUNK_ELEMENTS // head.out_features) if hasattr(head, "out_features") else 256
    if len(labels) <= rows_at_once:
        losses = of_chunk(hidden_states, labels)
    else:
        chunks = zip(hidden_states.split(rows_at_once), labels.split(rows_at_once))
        losses = torch.cat([checkpoint(of_chunk, rows, targets, use_reentrant=False) for rows, targets in chunks])
    return tuple(own.sum() for own in (losses * weights).split(sizes)), losses.detach()


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


def _rows_at_once(vocab_size: int, device: torch.device) -> int:
    return max(1, (CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS) // vocab_size)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _blocks(weight: torch.Tensor, dtype: torch.dtype):
    """The weight in `dtype` as (first row, rows): all at once where it has that type, else cast a block at a time."""
    size = len(weight) if weight.dtype == dtype else CAST_ROWS
    return ((first, weight[first : first + size].to(dtype)) for first in range(0, len(weight), size))


def _logits(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    parts = [rows @ block.T for _, block in _blocks(weight, rows.dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _to_probabilities(logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
    """Losses `(rows,)` of labels `(rows, 1)`; in the place of the logits there are probabilities then."""
    log_probs = logits.log_softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses = -log_probs.gather(1, labels)[:, 0]
    logits.copy_(log_probs.exp_())
    return losses


def _to_probabilities_by_parts(logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
    """The same, few rows in float32 at a time; a compiled one holds none."""
    rows_at_once = max(1, CHUNK_ELEMENTS // logits.shape[1])
    parts = zip(logits.split(rows_at_once), labels.split(rows_at_once))
    return torch.cat([_to_probabilities(*own) for own in parts])


@cache
def _compiled_to_probabilities() -> Callable:
    return torch.compile(_to_probabilities)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, labels, weights, compiled, with_gradients):
        ctx.set_materialize_grads(False)
        losses = _widen(hidden_states.new_empty(len(labels)))
        weights = weights.to(losses.dtype)
        grad_hidden = grad_weight = None
        if with_gradients and len(labels):
            grad_hidden = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
            grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_probabilities = _compiled_to_probabilities() if compiled else _to_probabilities_by_parts
        rows_at_once = _rows_at_once(len(weight), hidden_states.device)
        for first in range(0, len(labels), rows_at_once):
            chosen = slice(first, first + rows_at_once)
            # Cloned, as a compiler tells tensors apart by where they begin in their storage.
            rows, targets = hidden_states[chosen], labels[chosen, None].clone()
            grad_logits = _logits(rows, weight)
            losses[chosen] = to_probabilities(grad_logits, targets)
            if grad_hidden is None and grad_weight is None:
                continue
            # The gradient of the logits: probabilities, less one at the label.
            grad_logits.scatter_(1, targets, torch.expm1(-losses[chosen, None]).to(grad_logits.dtype))
            # The losses' weights go into what is narrow.
            weighted_rows = (rows * weights[chosen, None]).to(rows.dtype)
            grad_rows = 0
            for first_entry, block in _blocks(weight, rows.dtype):
                entries = slice(first_entry, first_entry + len(block))
                own = grad_logits[:, entries]
                if grad_hidden is not None:
                    grad_rows = grad_rows + own @ block
                if grad_weight is None:
                    continue
                if weight.dtype == rows.dtype:
                    grad_weight[entries].addmm_(own.T, weighted_rows)
                else:
                    grad_weight[entries] += own.T @ weighted_rows
            if grad_hidden is not None:
                grad_hidden[chosen] = (grad_rows * weights[chosen, None]).to(rows.dtype)
        ctx.gradients = [grad_hidden, grad_weight]
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        if ctx.gradients is None:
            raise RuntimeError("The gradients of the head's loss are handed out once: its graph cannot be used again.")
        # Scaled where they lie, and let go of: the head's is as large as its weight.
        gradients, ctx.gradients = ctx.gradients, None
        return *(own if own is None else own.mul_(grad_total) for own in gradients), None, None, None, None
