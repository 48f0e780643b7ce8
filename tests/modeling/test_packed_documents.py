"""Rows of several documents, and attention run by run."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from test_decoder import batch_of_images

from nextflow_hf.modeling import block_attention
from nextflow_hf.modeling.block_attention import BatchRuns, Run, find_runs
from nextflow_hf.modeling.image_layout import positions_in_documents

TEXT_ONLY = torch.tensor([7, 9, 11, 12, 13])


@pytest.fixture(params=["eager", "sdpa", "block_varlen"])
def model(request):
    model = small_model()
    model.model.language_model.set_attn_implementation(request.param)
    return model


def documents(model):
    """Two documents with pictures of different shapes, as batches of one."""
    batch = batch_of_images(model.config)
    for row in range(2):
        length = int(batch["attention_mask"][row].sum())
        yield {
            "input_ids": batch["input_ids"][row : row + 1, :length],
            "image_codes": batch["image_codes"][row : row + 1],
            "image_grids": batch["image_grids"][row : row + 1],
        }


def packed(parts, gap=0):
    """One row of all documents, with text alone in the middle and `gap` columns of padding at the end."""
    ids = [parts[0]["input_ids"][0], TEXT_ONLY, parts[1]["input_ids"][0], torch.zeros(gap, dtype=torch.long)]
    return {
        "input_ids": torch.cat(ids)[None],
        "document_ids": torch.cat([torch.full_like(own, i) for i, own in enumerate([*ids[:3], ids[3] - 1])])[None],
        "image_codes": torch.cat([part["image_codes"] for part in parts]),
        "image_grids": torch.cat([part["image_grids"] for part in parts]),
    }


def test_a_packed_document_is_what_it_is_alone(model):
    parts = list(documents(model))
    row = packed(parts, gap=3)
    row["document_ids"][0, -3:] = -1
    together = model.model(**row).last_hidden_state[0]
    alone = [
        model.model(**parts[0]).last_hidden_state[0],
        model.model(input_ids=TEXT_ONLY[None]).last_hidden_state[0],
        model.model(**parts[1]).last_hidden_state[0],
    ]
    torch.testing.assert_close(together[:-3], torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_nothing_in_a_packed_row_sees_nothing():
    """A position without a key is NaN in the backward pass of some kernels."""
    model = small_model()
    row = packed(list(documents(model)), gap=3)
    row["document_ids"][0, -3:] = -1
    seen = {}
    model.model.language_model.register_forward_pre_hook(lambda *args: seen.update(args[-1]), with_kwargs=True)
    model.model(**row)
    assert seen["attention_mask"]["full_attention"].any(dim=-1).all()


def test_packed_loss_and_gradients_equal_padded(model):
    parts = list(documents(model))
    row = packed(parts)
    length = max(part["input_ids"].shape[1] for part in parts)
    ids = [parts[0]["input_ids"][0], TEXT_ONLY, parts[1]["input_ids"][0]]
    padded_ids = torch.stack([F.pad(own, (0, length - len(own)), value=0) for own in ids])
    mask = torch.stack([F.pad(torch.ones_like(own), (0, length - len(own))) for own in ids])
    labels = torch.where(mask.bool(), padded_ids, -100)
    image_labels = row["image_codes"].masked_fill(row["image_codes"] < 0, -100)
    images = {name: row[name] for name in ("image_codes", "image_grids")}
    losses = {}
    for name, batch in (
        ("packed", {**row, "labels": row["input_ids"]}),
        ("padded", {"input_ids": padded_ids, "attention_mask": mask, "labels": labels, **images}),
    ):
        model.zero_grad()
        output = model(**batch, image_labels=image_labels)
        output.loss.backward()
        losses[name] = (output.text_loss, output.image_loss, model.model.connector.linear_1.weight.grad.clone())
    for own, other in zip(losses["packed"], losses["padded"]):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_run_by_run_equals_the_mask_with_padding_on_both_sides():
    batch = batch_of_images(small_model().config)
    flipped = {
        **batch,
        "input_ids": torch.stack(
            [row.roll(int((mask == 0).sum())) for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
        ),
        "attention_mask": batch["attention_mask"].flip(1),
    }
    for own in (batch, flipped):
        outputs = []
        for implementation in ("sdpa", "block_varlen"):
            model = small_model()
            model.model.language_model.set_attn_implementation(implementation)
            outputs.append(model.model(**own).last_hidden_state[own["attention_mask"].bool()])
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def of_one_kind(query, key, value, call, causal, dropout, scaling):
    """What FlashAttention's kernel does for runs of varying length, in plain steps."""
    groups = query.shape[1] // key.shape[1]
    key, value = (own.repeat_interleave(groups, dim=1) for own in (key, value))
    parts = [query.split(call.query_ends.diff().tolist())]
    parts += [own.split(call.key_ends.diff().tolist()) for own in (key, value)]
    outputs = []
    for queries, keys, values in zip(*parts):
        assert len(queries) <= call.longest_run and len(keys) <= call.longest_past
        mask = torch.ones(len(queries), len(keys), dtype=torch.bool)
        mask = mask.tril(len(keys) - len(queries)) if causal else mask
        own = F.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in (queries, keys, values)), attn_mask=mask, scale=scaling
        )
        outputs.append(own.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("rows", ["packed", "padded_left"])
def test_all_runs_at_once_equal_run_by_run(monkeypatch, rows, autocast):
    model = small_model()
    model.model.language_model.set_attn_implementation("block_varlen")
    if rows == "packed":
        row = packed(list(documents(model)), gap=3)
        row["document_ids"][0, -3:] = -1
        kept = row["document_ids"] >= 0
    else:
        row = batch_of_images(model.config)
        ids = zip(row["input_ids"], row["attention_mask"])
        row["input_ids"] = torch.stack([own.roll(int((mask == 0).sum())) for own, mask in ids])
        row["attention_mask"] = row["attention_mask"].flip(1)
        kept = row["attention_mask"].bool()
    results, seen = [], []

    def takes_many_runs(*tensors, answer):
        seen.append({own.dtype for own in tensors})
        return answer

    monkeypatch.setattr(block_attention, "_flash_attention", of_one_kind)
    for at_once in (False, True):
        monkeypatch.setattr(block_attention, "_takes_many_runs", partial(takes_many_runs, answer=at_once))
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.model(**row).last_hidden_state[kept].float()
        hidden.square().sum().backward()
        weights = model.model.language_model.layers[0].self_attn
        results.append((hidden, weights.q_proj.weight.grad, weights.k_proj.weight.grad, weights.v_proj.weight.grad))
    # Under autocast too, though rotations make queries and keys float32.
    assert seen and all(own == {torch.bfloat16 if autocast else torch.float32} for own in seen)
    for one, other in zip(*results):
        if autocast:
            assert (one - other).norm() < 0.02 * other.norm()
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_where_keys_would_be_copied_too_often_it_is_run_by_run(monkeypatch):
    def of_pictures(number):
        """A document of so many pictures of three scales, each behind four words."""
        picture = [own for scale, slots in ((0, 1), (1, 4), (2, 16)) for own in [scale] * slots]
        blocks = [own for index in range(number) for own in [-1] * 4 + [3 * index + own for own in picture]]
        blocks = torch.tensor([blocks])
        return BatchRuns(find_runs(blocks, torch.zeros_like(blocks)), blocks.shape[1])

    few, many = of_pictures(5), of_pictures(50)
    copies = sum(len(call.keys) for call in few.calls(torch.device("cpu")).values())
    assert copies <= block_attention.MAX_COPIES * 5 * 25
    monkeypatch.setattr(block_attention, "_takes_many_runs", lambda *tensors: True)
    monkeypatch.setattr(block_attention, "_attend_at_once", lambda *args: "at once")
    monkeypatch.setattr(block_attention, "_attend_row", lambda attend, query, *args: query)
    for runs, positions in ((few, 5 * 25), (many, 50 * 25)):
        tensors = [torch.zeros(1, 2, positions, 8)] * 3
        output, _ = block_attention.block_varlen_attention(torch.nn.Module(), *tensors, None, runs=runs)
        assert (output == "at once") if runs is few else torch.equal(output, tensors[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels are CUDA's")
def test_flash_attentions_kernels_equal_run_by_run(monkeypatch):
    """Text, three scales, text behind them; a second document, and padding: heads share keys, as in the 7B."""
    lengths, blocks = (150, 4, 64, 700, 90, 33, 16, 7), (-1, 0, 1, 2, -1, -1, 3, -1)
    ids = torch.tensor([0, 0, 0, 0, 0, 1, 1, -1])
    ids, blocks = (torch.as_tensor(own).repeat_interleave(torch.tensor(lengths))[None] for own in (ids, blocks))
    runs = BatchRuns(find_runs(blocks, ids), ids.shape[1])
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    torch.manual_seed(0)
    heads = (6, 2, 2)
    inputs = [torch.randn(1, ids.shape[1], own, 64, device="cuda").transpose(1, 2).requires_grad_() for own in heads]
    exact, calls = None, []
    flash_attention = block_attention._flash_attention
    monkeypatch.setattr(block_attention, "_flash_attention", lambda *args: calls.append(1) or flash_attention(*args))
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        # Under autocast values come from a product in its type, queries and keys from rotations in float32.
        dtypes = (dtype, dtype, torch.bfloat16 if autocast else dtype)
        tensors = [own.to(given) for own, given in zip(inputs, dtypes)]
        calls.clear()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            output, _ = block_attention.block_varlen_attention(module, *tensors, None, scaling=0.1, runs=runs)
        own = (output, *torch.autograd.grad(output.float().square().sum(), inputs))
        exact = own if exact is None else exact
        assert len(calls) == (0 if own is exact else 2)
        for one, other in zip(own, exact):
            assert (one.float() - other).norm() < 0.02 * other.norm()


def test_run_by_run_draws_the_same_codes():
    prompt = torch.tensor([[7, 8, 9]])
    codes = []
    for implementation in ("sdpa", "block_varlen"):
        model = small_model()
        model.model.language_model.set_attn_implementation(implementation)
        codes.append(model.generate(prompt, generation_mode="image", image_size=(32, 32), seed=3).codes[0])
    assert torch.equal(*codes)


def test_runs_of_a_row():
    blocks = torch.tensor([[-1, -1, 0, 0, 1, -1, -1, -1, 2, -1]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, -1]])
    assert find_runs(blocks, documents) == [
        [Run(0, 2, 0, True), Run(2, 4, 0, False), Run(4, 5, 0, False), Run(5, 6, 0, True)]
        + [Run(6, 8, 6, True), Run(8, 9, 6, False)]
    ]
    assert positions_in_documents(documents)[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_documents_are_checked():
    model = small_model()
    with pytest.raises(ValueError, match="shape of the inputs"):
        model(input_ids=TEXT_ONLY[None], document_ids=torch.zeros(1, 4, dtype=torch.long))
    cache = model(input_ids=TEXT_ONLY[None], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot follow a cache"):
        model(input_ids=TEXT_ONLY[None], document_ids=torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
