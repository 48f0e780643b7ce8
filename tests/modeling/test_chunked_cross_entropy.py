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


def test_gradients_are_made_only_where_they_are_asked_for(monkeypatch):
    head = nn.Linear(16, 50, bias=False)
    inputs = torch.randn(5, 16, requires_grad=True), torch.arange(5), torch.ones(5)
    made = []
    monkeypatch.setattr(module.torch, "expm1", lambda own: made.append(own) or own)
    with torch.no_grad():
        chunked_cross_entropy(head, *inputs)
    assert not made


UPSTREAM = {
    "equal": lambda one, other: 3.0 * (one + other),
    "different": lambda one, other: one - 0.3 * other,
    "one_group": lambda one, other: 2.0 * other,
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_groups_share_a_buffer_and_are_differentiated_by_themselves(monkeypatch, upstream, autocast):
    """Once and again, over a graph that is kept; scored again only where the one buffer does not do."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7 * 50)
    scored, logits_of = [], module._logits
    monkeypatch.setattr(module, "_logits", lambda rows, weight: scored.append(len(rows)) or logits_of(rows, weight))
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False)
    rows, labels, sizes = torch.randn(31, 16, requires_grad=True), torch.randint(50, (31,)), [20, 11]
    weights = torch.rand(31)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = head(rows).float()
        (one, other), _ = chunked_cross_entropy(head, rows, labels, weights, sizes)
    plain = F.cross_entropy(logits, labels, reduction="none") * weights
    expected = torch.autograd.grad(UPSTREAM[upstream](*(own.sum() for own in plain.split(sizes))), (rows, head.weight))
    assert sum(scored) == 31
    loss = UPSTREAM[upstream](one, other)
    handed_out = []
    for again in range(2):
        handed_out.append(torch.autograd.grad(loss, (rows, head.weight), retain_graph=True))
        assert sum(scored) == 31 * (1 + again + (upstream != "equal"))
    # The second pass has left alone what the first has handed out.
    for own in handed_out:
        for chunked, exact in zip(own, expected):
            torch.testing.assert_close(chunked, exact, **({"atol": 5e-2, "rtol": 2e-2} if autocast else {}))


def test_equal_factors_are_known_without_asking_an_accelerator(monkeypatch):
    monkeypatch.setattr(module.torch, "equal", lambda *own: pytest.fail("compared"))
    model = small_model()
    batch = batch_of_images(model.config)
    image_labels = batch["image_codes"].masked_fill(batch["image_codes"] < 0, -100)
    (model(**batch, labels=batch["input_ids"], image_labels=image_labels).loss / 4).backward()


def test_nothing_from_above_and_weights_get_no_gradient():
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, own):
            return own.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    head, rows = nn.Linear(8, 16, bias=False), torch.randn(4, 8, requires_grad=True)
    weights = torch.ones(4, requires_grad=True)
    for own in (head, Wrapped(head)):
        (one, other), _ = chunked_cross_entropy(own, rows, torch.arange(4), weights, [1, 3])
        rows.grad = None
        (Nothing.apply(one) + Nothing.apply(other) + rows.sum()).backward()
        assert torch.equal(rows.grad, torch.ones_like(rows)) and weights.grad is None
    (one, other), _ = chunked_cross_entropy(head, rows, torch.arange(4), weights, [1, 3])
    (gradient,) = torch.autograd.grad(Nothing.apply(one) + other, rows)
    assert not gradient[0].any() and gradient[1:].any(dim=1).all()


def test_a_weight_that_was_changed_since_is_noticed():
    head, rows = nn.Linear(8, 16, bias=False), torch.randn(4, 8, requires_grad=True)
    (total,), _ = chunked_cross_entropy(head, rows, torch.arange(4), torch.ones(4))
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_in_float16_a_smaller_loss_scale_is_a_remedy():
    """Large hidden states, and weights as uneven as those of scales: what overflows depends on the loss scale."""
    torch.manual_seed(0)
    head = nn.Linear(64, 512, bias=False)
    nn.init.normal_(head.weight, std=0.002)
    rows = (torch.randn(4096, 64) * 50 + 50).requires_grad_()
    weights = torch.full((4096,), 0.5)
    weights[::680] = 344.0
    labels = torch.randint(512, (4096,)).masked_fill(weights > 1, 3)
    exact = torch.autograd.grad((F.cross_entropy(head(rows), labels, reduction="none") * weights).mean(), head.weight)
    finite = []
    for scale in (2.0**26, 64.0):
        with torch.autocast("cpu", torch.float16):
            (loss,), _ = chunked_cross_entropy(head, rows, labels, weights / len(labels))
        gradients = torch.autograd.grad(loss * scale, (head.weight, rows))
        finite.append(all(bool(own.isfinite().all()) for own in gradients))
    assert finite == [False, True]
    torch.testing.assert_close(gradients[0] / scale, *exact, atol=1e-2, rtol=5e-2)
