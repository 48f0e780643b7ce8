"""Cross-entropy of a linear head over a large vocabulary, without ever holding all rows' logits.

At 184,832 entries and 10,084 slots, one image's logits alone are 7.5 GB in float32. Here a chunk of rows is scored at a
time, and its gradients are taken at once, in the forward pass: a backward pass would have to score it again, a quarter
of the head's products. They go straight into one buffer for the head's weight, all groups' together. That holds where
the groups' sums weigh alike in what is differentiated, as in the models' loss; otherwise, and for a second backward
pass, chunks are scored again. Under autocast the products are taken in its type, and a weight of another type is cast
block by block, never whole. After `compile_loss` what is done to a plain head's logits is one kernel.
"""

from collections.abc import Callable, Sequence

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
        weights: `(rows,)`, of the losses in the sums, for a mean with its 1 / rows; they get no gradient.
        sizes: Rows of each group that is summed by itself; by default all are one.

    Returns:
        The groups' sums, and the single rows' losses `(rows,)`, which have no gradient; all in float32 (float64 for
        float64 inputs).
    """
    sizes = [len(labels)] if sizes is None else list(sizes)
    weights = weights.detach()
    if is_plain(head, hidden_states):
        kind = hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(kind))
        if hidden_states.dtype in (head.weight.dtype, torch.bfloat16, torch.float16):
            settings = getattr(head, "loss_compilation", None)
            to_probabilities = _to_probabilities_by_parts
            if settings is not None:
                to_probabilities = torch.compile(_to_probabilities, **settings)
            *sums, losses = _LinearCrossEntropy.apply(
                hidden_states, head.weight, labels, weights, sizes, to_probabilities, torch.is_grad_enabled()
            )
            return tuple(sums), losses

    def of_chunk(rows, targets):
        return F.cross_entropy(_widen(head(rows)), targets, reduction="none")

    rows_at_once = max(1, CHUNK_ELEMENTS // head.out_features) if hasattr(head, "out_features") else 256
    if len(labels) <= rows_at_once:
        losses = of_chunk(hidden_states, labels)
    else:
        chunks = zip(hidden_states.split(rows_at_once), labels.split(rows_at_once))
        losses = torch.cat([checkpoint(of_chunk, rows, targets, use_reentrant=False) for rows, targets in chunks])
    return tuple(own.sum() for own in (losses * weights).split(sizes)), losses.detach()


def compile_loss(head: nn.Module, **kwargs) -> None:
    """Let `chunked_cross_entropy` compile what it does to the logits of this head, where it is plain.

    Args:
        head: The head; the settings are its `loss_compilation` then.
        kwargs: What `torch.compile` takes.
    """
    head.loss_compilation = kwargs


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
    logits = rows.new_empty(len(rows), len(weight))
    for first, block in _blocks(weight, rows.dtype):
        torch.mm(rows, block.T, out=logits[:, first : first + len(block)])
    return logits


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


def _losses_and_gradients(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.LongTensor,
    factors: torch.Tensor,
    wanted: Sequence[bool],
    to_probabilities: Callable,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Losses `(rows,)`, and gradients of their sum by `factors` `(rows,)`, a chunk of rows at a time.

    Args:
        wanted: Whether the gradient of the hidden states is wanted, and whether that of the weight.
    """
    losses = torch.empty_like(factors)
    grad_hidden = torch.empty_like(hidden_states) if wanted[0] else None
    grad_weight = torch.zeros_like(weight) if wanted[1] else None
    rows_at_once = _rows_at_once(len(weight), hidden_states.device)
    for first in range(0, len(labels), rows_at_once):
        chosen = slice(first, first + rows_at_once)
        # Cloned, as a compiler tells tensors apart by where they begin in their storage.
        rows, targets = hidden_states[chosen], labels[chosen, None].clone()
        grad_logits = _logits(rows, weight)
        losses[chosen] = to_probabilities(grad_logits, targets)
        if not any(wanted):
            continue
        # The gradient of the logits: probabilities, less one at the label.
        grad_logits.scatter_(1, targets, torch.expm1(-losses[chosen, None]).to(grad_logits.dtype))
        # The factors go into what is narrow.
        scaled_rows = (rows * factors[chosen, None]).to(rows.dtype)
        grad_rows = 0
        for first_entry, block in _blocks(weight, rows.dtype):
            entries = slice(first_entry, first_entry + len(block))
            own = grad_logits[:, entries]
            if grad_hidden is not None:
                grad_rows = grad_rows + own @ block
            if grad_weight is None:
                continue
            if weight.dtype == rows.dtype:
                grad_weight[entries].addmm_(own.T, scaled_rows)
            else:
                grad_weight[entries] += own.T @ scaled_rows
        if grad_hidden is not None:
            grad_hidden[chosen] = (grad_rows * factors[chosen, None]).to(rows.dtype)
    return losses, [grad_hidden, grad_weight]


class _LinearCrossEntropy(torch.autograd.Function):
    """Sums of groups of rows, and the rows' losses."""

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, weights, sizes, to_probabilities, with_gradients):
        ctx.set_materialize_grads(False)
        weights = weights.to(torch.promote_types(hidden_states.dtype, torch.float32))
        wanted = ctx.needs_input_grad[:2]
        # A loss scale must reach float16's gradients before they are rounded: they wait for it.
        at_once = with_gradients and any(wanted) and len(labels) > 0 and hidden_states.dtype != torch.float16
        with torch.autocast(hidden_states.device.type, enabled=False):
            losses, gradients = _losses_and_gradients(
                hidden_states, weight, labels, weights, wanted if at_once else (False, False), to_probabilities
            )
        ctx.gradients = gradients if at_once else None
        ctx.sizes, ctx.to_probabilities = sizes, to_probabilities
        ctx.save_for_backward(hidden_states, weight, labels, weights)
        ctx.mark_non_differentiable(losses)
        return *(own.sum() for own in (losses * weights).split(sizes)), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        hidden_states, weight, labels, weights = ctx.saved_tensors
        # Handed out once, as they are scaled where they lie: the head's is as large as its weight.
        gradients, ctx.gradients = ctx.gradients, None
        upstream = grad_outputs[: len(ctx.sizes)]
        used = [own for own, size in zip(upstream, ctx.sizes) if size]
        if gradients is not None and _are_equal(used):
            gradients = [own if own is None else own.mul_(used[0]) for own in gradients]
        else:
            del gradients
            factors = [weights.new_zeros(()) if own is None else own.to(weights.dtype) for own in upstream]
            factors = torch.cat([own.expand(size) for own, size in zip(factors, ctx.sizes)])
            with torch.autocast(hidden_states.device.type, enabled=False):
                _, gradients = _losses_and_gradients(
                    hidden_states, weight, labels, weights * factors, ctx.needs_input_grad[:2], ctx.to_probabilities
                )
        return *gradients, None, None, None, None, None


def _are_equal(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether all are one number; of one and the same tensor that is known without asking an accelerator."""
    if any(own is None for own in tensors):
        return False
    return all(own is tensors[0] or torch.equal(own, tensors[0]) for own in tensors[1:])
