import pytest
import torch
from dots import SQUARE, codes_of
from small_models import small_model
from torch.utils.data import DataLoader

import nextflow_hf
from nextflow_hf.modeling.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling.image_layout import layout_sequences
from nextflow_hf.training.packing import (
    Bin,
    PackedSequences,
    SequenceCost,
    attended_pairs,
    collate_packed,
    spread_evenly,
    tokens_of,
)
from nextflow_hf.training.sequences import CodedImage


def text_of(length):
    return {"input_ids": [7] * length, "labels": [7] * length, "codes": [], "image_labels": [], "grids": []}


def sized(items):
    return [(tokens_of(item), item) for item in items]


def mixed(builder):
    """Drawing, reading, text alone and a document of two pictures."""
    image = CodedImage(codes_of(), SQUARE)
    story = [{"role": None, "content": [{"type": "image"}, {"type": "text", "text": "dot 1"}, {"type": "image"}]}]
    return [
        builder.draw("draw dot 1", codes_of(), SQUARE),
        builder.read("which", "dot 2", codes_of()[::-1], SQUARE),
        builder.build([{"role": None, "content": "draw dot 1 which"}], []),
        builder.build(story, [image, CodedImage(codes_of()[::-1], SQUARE)]),
    ]


def test_packed_loss_equals_padded_loss(builder):
    torch.manual_seed(0)
    model = nextflow_hf.NextFlowForConditionalGeneration(builder.config).eval()
    items = mixed(builder)
    padded = model(**builder.collate(items))
    for bins, left in (spread_evenly(sized(items), 1, 1000), spread_evenly(sized(items), 4, 80)):
        assert not left
        packed = model(**collate_packed([own for own, _ in bins]))
        torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed.text_loss, padded.text_loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed.image_loss, padded.image_loss, rtol=1e-5, atol=1e-5)


def test_every_sequence_is_packed_once_and_none_overflows():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (1000,), generator=generator).tolist()
    bins = list(PackedSequences([text_of(n) for n in lengths], capacity=128, window=64))
    assert sorted(len(item["input_ids"]) for own in bins for item in own.items) == sorted(lengths)
    assert all(own.size == sum(map(tokens_of, own.items)) <= 128 for own in bins)
    fill = sum(own.size for own in bins) / (128 * len(bins))
    assert fill > 0.95
    again = list(PackedSequences([text_of(n) for n in lengths], capacity=128, window=64))
    assert again == bins


def test_bins_are_filled_evenly():
    """No bin is left nearly empty, and what has no room is given back."""
    items = [text_of(n) for n in (60, 50, 40, 30, 20, 10, 10, 10)]
    bins, left = spread_evenly(sized(items), 3, 100)
    assert not left and [own.size for own, _ in bins] == [80, 80, 70]
    assert all(own.items == tuple(item for _, item in members) for own, members in bins)
    bins, left = spread_evenly(sized(items), 2, 100)
    assert [own.size for own, _ in bins] == [100, 100] and sum(size for size, _ in left) == 30


def test_a_sequence_is_measured_once():
    measured = []

    def size_of(item):
        measured.append(item)
        return tokens_of(item)

    items = [text_of(10 + number % 40) for number in range(200)]
    assert len(list(PackedSequences(items, capacity=128, size_of=size_of, window=32))) > 10
    assert len(measured) == len(items)


def test_processes_and_their_workers_share_the_sequences():
    """Each makes its own alone."""

    class Counted(list):
        made = 0

        def __getitem__(self, index):
            self.made += 1
            return super().__getitem__(index)

    items = Counted({**text_of(10 + number), "id": number} for number in range(60))
    found = []
    for process in range(3):
        packed = PackedSequences(items, capacity=300, window=8)
        packed.process, packed.processes = process, 3
        items.made = 0
        alone = [item["id"] for own in packed for item in own.items]
        assert items.made == 20 and sorted(alone) == list(range(process, 60, 3))
        loader = DataLoader(packed, batch_size=2, num_workers=2, collate_fn=lambda bins: bins)
        found += [item["id"] for bins in loader for own in bins for item in own.items]
    assert sorted(found) == list(range(60))


def test_an_endless_stream_begins_anew_and_one_of_nothing_is_refused():
    items = [{**text_of(10 + number), "id": number} for number in range(20)]
    once = [[item["id"] for item in own.items] for own in PackedSequences(items, capacity=100, window=8)]
    endless = iter(PackedSequences(items, capacity=100, window=8, endless=True))
    assert [[item["id"] for item in next(endless).items] for _ in range(2 * len(once) + 1)] == [*once, *once, once[0]]
    with pytest.raises(ValueError, match="none is left for this process"):
        next(iter(PackedSequences([], capacity=100, endless=True)))


def test_rows_are_bounded_whatever_they_cost():
    bins = list(PackedSequences([text_of(10)] * 50, capacity=1e9, max_tokens=35, window=20))
    assert {len(own.items) for own in bins} <= {1, 2, 3} and sum(len(own.items) for own in bins) == 50


def test_sequences_larger_than_a_bin_are_left_out_up_to_a_limit(caplog):
    long = {**text_of(200), "id": "long"}
    items = [*[text_of(20)] * 150, long, *[text_of(20)] * 50]
    bins = list(PackedSequences(items, capacity=128, window=100))
    assert sum(len(own.items) for own in bins) == 200
    assert "Sequence long of 200 tokens" in caplog.text
    with pytest.raises(ValueError, match="nor did 1 of the 151 before it"):
        list(PackedSequences([*items[:151], long], capacity=128, window=100))
    with pytest.raises(ValueError, match="at most 100 tokens"):
        list(PackedSequences([text_of(120)], capacity=128, max_tokens=100, window=1))
    with pytest.raises(ValueError, match="positive capacity"):
        PackedSequences([], capacity=0)


def test_pairs_are_those_of_the_mask(builder, builder_of):
    """What the cost counts is what the mask lets through."""
    model = small_model().model
    final = builder_of(context_image="final", levels=(3, 4))
    for item in [*mixed(builder), final.read("which", "dot 1", codes_of(), SQUARE)]:
        ids = torch.tensor([item["input_ids"]])
        layout = layout_sequences(ids, None, item["grids"], builder.config)
        embeds = torch.zeros(1, ids.shape[1], 32)
        mask = model._attention_mask(embeds, torch.ones_like(ids), None, layout.block_ids, None, {})["full_attention"]
        expected = ids.shape[1] * (ids.shape[1] + 1) // 2 if mask is None else int(mask.sum())
        assert attended_pairs(item["input_ids"], item["grids"], builder.config.image_token_id) == expected


def test_the_cost_of_the_7b():
    """Linear layers: 2 FLOPs per weight and token (6.5e9 weights in 28 layers, NextFlow's arithmetic)."""
    cost = SequenceCost(NextFlowConfig.from_preset("nextflow-7b"))
    assert cost.per_token == pytest.approx(2 * 6.525e9, rel=1e-3)
    caption = cost({**text_of(100), "labels": [-100] * 100})
    assert caption == pytest.approx(100 * cost.per_token, rel=0.01)


def test_attention_weighs_what_it_is_given():
    config = NextFlowConfig.from_preset("nextflow-mini")
    item = {**text_of(100), "labels": [-100] * 100}
    plain, half = SequenceCost(config), SequenceCost(config, attention_weight=0.5)
    attention = plain(item) - 100 * plain.per_token
    assert half(item) == pytest.approx(100 * plain.per_token + attention / 2)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        SequenceCost(config, attention_weight=0)


def test_a_row_of_text_alone_has_gradients_of_zero_for_the_rest_where_there_are_other_processes(monkeypatch, builder):
    """Which would wait for them."""
    model = nextflow_hf.NextFlowForConditionalGeneration(builder.config).train()
    row = collate_packed([Bin((text_of(8),), 8)])
    row = {name: own for name, own in row.items() if not name.startswith("image")}
    alone = model(**row).loss
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    loss = model(**row).loss
    loss.backward()
    assert torch.equal(loss, alone)
    for part in (model.model.connector, model.model.scale_embedding):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())
