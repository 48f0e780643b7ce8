import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from test_decoder import batch_of_images
from torch import nn

from nextflow_hf.modeling import chunked_cross_entropy as module
from nextflow_hf.modeling.chunked_cross_entropy import chunked_cross_entropy


class Wrapped(nn.Module):
    """A head that must be called as a module, such as one with an adapter."""

    def __init__(self, head):
        super().__init__()
        self.head, self.out_features = head, head.out_features

    def forward(self, rows):
        return self.head(rows)


@pytest.mark.parametrize("wrap", [lambda head: head, Wrapped], ids=["plain", "wrapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_equal_the_plain_ones(monkeypatch, wrap, dtype):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7 * 50)
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=dtype)
    rows, labels = torch.randn(31, 16, dtype=dtype, requires_grad=True), torch.randint(50, (31,))
    weights = torch.rand(31, dtype=dtype)
    results = []
    plain = F.cross_entropy(head(rows), labels, reduction="none")
    of_groups = [own.sum() for own in (plain * weights).split([20, 11])]
    for sums, losses in (
        (of_groups, plain.detach()),
        chunked_cross_entropy(wrap(head), rows, labels, weights, [20, 11]),
    ):
        loss = sums[0] - 0.3 * sums[1]
        results.append((loss.detach(), losses, *torch.autograd.grad(loss, (rows, head.weight))))
    for plain, chunked in zip(*results):
        torch.testing.assert_close(plain, chunked, atol=1e-6, rtol=1e-5)


def test_the_models_losses_do_not_depend_on_the_chunks(monkeypatch):
    results = []
    for elements in (2**26, 7 * 96):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        model = small_model()
        batch = batch_of_images(model.config)
        image_labels = batch["image_codes"].masked_fill(batch["image_codes"] < 0, -100)
        output = model(**batch, labels=batch["input_ids"], image_labels=image_labels)
        output.loss.backward()
        results.append((output.loss, model.lm_head.weight.grad, model.model.connector.linear_1.weight.grad))
    for plain, chunked in zip(*results):
        torch.testing.assert_close(plain, chunked, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_and_bfloat16():
    head = nn.Linear(16, 50, bias=False).requires_grad_(False)
    rows = torch.randn(5, 16, requires_grad=True)
    labels, weights = torch.arange(5), torch.ones(5)
    chunked_cross_entropy(head, rows, labels, weights)[0][0].backward()
    assert rows.grad.isfinite().all() and head.weight.grad is None
    low = nn.Linear(16, 50, bias=False, dtype=torch.bfloat16)
    (total,), losses = chunked_cross_entropy(low, rows.detach().bfloat16(), labels, weights)
    assert total.dtype == losses.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        mixed = chunked_cross_entropy(head, rows.detach(), labels, weights)[1]
    torch.testing.assert_close(
        mixed, chunked_cross_entropy(head, rows.detach(), labels, weights)[1], atol=0.05, rtol=0.05
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32_weight", "bfloat16_weight"])
def test_under_autocast_it_is_lean_and_equals_the_plain_loss(monkeypatch, dtype):
    """Products in bfloat16, losses in float32, gradients in the weights' type; the weight is cast a block at a time."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7 * 50)
    monkeypatch.setattr(module, "CAST_ROWS", 16)
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=dtype)
    rows, labels = torch.randn(31, 16, requires_grad=True), torch.randint(50, (31,))
    called = []
    head_forward = head.forward
    results = []
    for way in ("plain", "chunked"):
        with torch.autocast("cpu", torch.bfloat16):
            if way == "plain":
                loss = F.cross_entropy(head(rows).float(), labels, reduction="sum")
            else:
                monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.append(self) or head_forward(x))
                (loss,), _ = chunked_cross_entropy(head, rows, labels, torch.ones(31))
        gradients = torch.autograd.grad(loss, (rows, head.weight))
        assert loss.dtype == torch.float32 and gradients[1].dtype == dtype
        results.append((loss.detach(), *gradients))
    assert not called
    for plain, chunked in zip(*results):
        torch.testing.assert_close(plain, chunked, atol=2e-2, rtol=2e-2)


def test_no_labels_give_no_loss():
    head = nn.Linear(16, 50, bias=False)
    rows = torch.zeros(0, 16, requires_grad=True)
    (total,), losses = chunked_cross_entropy(head, rows, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert total == 0 and losses.shape == (0,)
    total.backward()


def test_gradients_are_made_only_where_they_are_asked_for_and_handed_out_once(monkeypatch):
    head = nn.Linear(16, 50, bias=False)
    inputs = torch.randn(5, 16, requires_grad=True), torch.arange(5), torch.ones(5)
    made = []
    monkeypatch.setattr(module.torch, "expm1", lambda own: made.append(own) or own)
    with torch.no_grad():
        chunked_cross_entropy(head, *inputs)
    assert not made
    (total,), _ = chunked_cross_entropy(head, *inputs)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()
