import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import small_config, small_model
from transformers import DynamicCache

from nextflow_hf.modeling import modeling_nextflow
from nextflow_hf.modeling.configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from nextflow_hf.modeling.image_layout import layout_sequences
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration

SQUARE = ((1, 1), (2, 2), (3, 3), (4, 4))
WIDE = ((1, 1), (1, 3), (2, 4), (2, 6))


def image_tokens(config, grids, blocks=None):
    slots = sum(h * w for h, w in grids[1:][:blocks])
    return [config.boi_token_id] + [config.image_token_id] * slots + [config.eoi_token_id]


def batch_of_images(config, seed=0, text=((7, 8, 9), (10,)), grids=(SQUARE, WIDE), after=((11, 12), (13,))):
    """Two rows of text, a picture, text, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[*t, *image_tokens(config, g), *a] for t, g, a in zip(text, grids, after)]
    length = max(map(len, rows))
    counts = [sum(h * w for h, w in g) for g in grids]
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "image_codes": torch.stack(
            [F.pad(torch.randint(32, (n,), generator=generator), (0, max(counts) - n), value=-1) for n in counts]
        ),
        "image_grids": torch.tensor(grids),
    }


def test_positions_of_the_papers_figure_5():
    """<boi> at (0,0,0), blocks at times 1 and 2, <eoi> at 3, text on from 4; spatial centres over [0, C]."""
    config = small_config(position_range=1.0)
    grids = SQUARE[:3]
    ids = torch.tensor([image_tokens(config, grids) + [7, 8]])
    layout = layout_sequences(ids, None, [grids], config)
    time, row, column = layout.position_ids[:, 0]
    assert layout.position_ids[:, 0, 0].tolist() == [0, 0, 0]
    assert time[1:5].tolist() == [1] * 4 and time[5:14].tolist() == [2] * 9
    # C / sqrt(h w) * (i + 1/2): at C = 1 a 2 x 2 grid has coordinates 1/4 and 3/4, a 3 x 3 grid 1/6, 3/6, 5/6.
    assert row[1:5].tolist() == [0.25, 0.25, 0.75, 0.75] and column[1:5].tolist() == [0.25, 0.75, 0.25, 0.75]
    torch.testing.assert_close(row[5:14:3], torch.tensor([1, 3, 5]) / 6)
    assert layout.position_ids[:, 0, 14].tolist() == [3, 3, 3]
    assert layout.position_ids[:, 0, 15].tolist() == [4, 4, 4]
    assert layout.block_ids[0].tolist() == [-1] + [0] * 4 + [1] * 9 + [-1] * 3


def test_an_18_scale_image_advances_text_time_by_18():
    config = NextFlowConfig.from_preset("nextflow-7b")
    grids = config.schedule.grids_for_size(1024, 1024)
    ids = torch.tensor([[5, config.boi_token_id] + [config.image_token_id] * (10084 - 1) + [config.eoi_token_id]])
    layout = layout_sequences(ids, None, [grids], config)
    assert layout.position_ids[0, 0, -1] - layout.position_ids[0, 0, 1] == 18
    assert layout.position_ids[1:].max() <= max(64, 19)


def test_slots_see_their_scale_both_ways_and_nothing_later(model):
    """Change a code: only what may see it changes."""
    batch = batch_of_images(model.config)
    before = model.model(**batch).last_hidden_state
    codes = batch["image_codes"].clone()
    # The last code of scale 2 feeds all slots of scale 3 (resized), hence everything from scale 3 on.
    codes[0, 4] = (codes[0, 4] + 1) % 32
    after = model.model(**{**batch, "image_codes": codes}).last_hidden_state
    moved = (before - after).abs().amax(dim=-1)[0] > 1e-6
    first_of_scale_3 = 3 + 1 + 4
    assert not moved[:first_of_scale_3].any() and moved[first_of_scale_3 : first_of_scale_3 + 9].all()


def test_a_slot_sees_later_slots_of_its_own_scale(model):
    layout = layout_sequences(torch.tensor([image_tokens(model.config, SQUARE)]), None, [SQUARE], model.config)
    embeds = torch.randn(1, layout.block_ids.shape[1], 32)
    kwargs = {"position_ids": layout.position_ids, "block_sequence_ids": layout.block_ids}
    before = model.model(inputs_embeds=embeds, **kwargs).last_hidden_state
    embeds[0, 4] += 1  # the last slot of scale 2
    after = model.model(inputs_embeds=embeds, **kwargs).last_hidden_state
    moved = (before - after).abs().amax(dim=-1)[0] > 1e-6
    assert not moved[0] and moved[1:].all()


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree(implementation):
    model = small_model()
    batch = batch_of_images(model.config)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model.model(**batch).last_hidden_state[valid]
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model.model(**batch).last_hidden_state[valid], expected, atol=1e-5, rtol=1e-5)


def test_batched_equals_one_by_one(model):
    batch = batch_of_images(model.config)
    together = model.model(**batch).last_hidden_state
    for row, grids in enumerate((SQUARE, WIDE)):
        length = int(batch["attention_mask"][row].sum())
        alone = model.model(
            input_ids=batch["input_ids"][row : row + 1, :length],
            image_codes=batch["image_codes"][row : row + 1],
            image_grids=torch.tensor([grids]),
        ).last_hidden_state
        torch.testing.assert_close(alone[0], together[row, :length], atol=1e-5, rtol=1e-5)


def test_padding_side_does_not_matter(model):
    batch = batch_of_images(model.config)
    right = model.model(**batch).last_hidden_state
    left = {**batch, "input_ids": batch["input_ids"].clone(), "attention_mask": batch["attention_mask"].clone()}
    shift = int((batch["attention_mask"][1] == 0).sum())
    assert shift > 0
    for name in ("input_ids", "attention_mask"):
        left[name][1] = batch[name][1].roll(shift)
    other = model.model(**left).last_hidden_state
    torch.testing.assert_close(other[1, shift:], right[1, :-shift], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_position_sees_something(implementation, side):
    """A row of a mask that is all shut is NaN, or its gradient is, in some kernels; padding sees padding."""
    model = small_model().model
    model.language_model.set_attn_implementation(implementation)
    row = [0, 0, 1, 1, 1, 1]
    given = torch.tensor([[1] * 6, row if side == "left" else row[::-1]])
    blocks = torch.full((2, 6), -1)
    mask = model._attention_mask(torch.zeros(2, 6, 32), given, None, blocks, None, {})["full_attention"]
    is_open = mask if mask.dtype == torch.bool else mask > -1
    assert is_open.any(dim=-1).all()
    seen = is_open[1, 0]
    tokens = given[1].bool()
    assert not seen[tokens][:, ~tokens].any() and not seen[~tokens][:, tokens].any()


def test_pixels_equal_their_codes(model):
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    ids = torch.tensor([[7, *image_tokens(model.config, SQUARE), 8]])
    codes = model.vq_model.encode(pixels).codes
    by_pixels = model(input_ids=ids, pixel_values=pixels).logits
    by_codes = model(input_ids=ids, image_codes=codes, image_grids=torch.tensor([SQUARE])).logits
    assert torch.equal(by_pixels, by_codes)


def test_padded_pixels_of_unequal_pictures_equal_each_alone(model):
    pixels = torch.zeros(2, 3, 32, 48)
    pixels[0, :, :32, :32] = torch.rand(3, 32, 32)
    pixels[1, :, :16, :48] = torch.rand(3, 16, 48)
    codes, grids = model.model.encode_images(pixels, torch.tensor([SQUARE, WIDE]))
    assert torch.equal(codes[0, :30], model.vq_model.encode(pixels[:1, :, :32, :32]).codes[0])
    assert torch.equal(codes[1, :24], model.vq_model.encode(pixels[1:, :, :16, :48]).codes[0])
    assert grids == [SQUARE, WIDE] and (codes[1, 24:] == -1).all()


def test_residual_input_is_the_previous_scale_alone(model):
    codes = [torch.randint(32, (1, h, w)) for h, w in SQUARE[:3]]
    residual = model.vq_model.scale_inputs(codes, SQUARE)
    other = [torch.randint(32, (1, 1, 1)), torch.randint(32, (1, 2, 2)), codes[2]]
    assert torch.equal(residual, model.vq_model.scale_inputs(other, SQUARE))
    assert not torch.equal(
        model.vq_model.scale_inputs(codes, SQUARE, "accumulated"),
        model.vq_model.scale_inputs(other, SQUARE, "accumulated"),
    )


def test_the_final_block_shows_the_finest_codes_to_what_follows():
    for context_image, slots in (("scales", 29), ("scales+final", 45), ("final", 16)):
        sees = context_image != "scales"
        model = small_model(context_image=context_image, levels=(3, 4))
        config = model.config
        ids = torch.tensor([[config.boi_token_id, *[config.image_token_id] * slots, config.eoi_token_id, 7]])
        codes = torch.randint(32, (1, 30))
        other = codes.clone()
        other[0, -16:] = (other[0, -16:] + 1) % 32
        last = [
            model(input_ids=ids, image_codes=c, image_grids=torch.tensor([SQUARE])).logits[0, -1]
            for c in (codes, other)
        ]
        assert torch.equal(*last) != sees


def test_a_final_block_alone_is_what_stands_at_the_end_of_all_blocks():
    """Same features, same scale embedding; it lies nearer in time, and predicts no codes."""
    model = small_model(context_image="final", levels=(3, 4))
    config, codes = model.config, torch.randint(32, (1, 30))
    embeds = []
    for slots in (45, 16):
        ids = torch.tensor([[config.boi_token_id, *[config.image_token_id] * slots, config.eoi_token_id]])
        layout = layout_sequences(ids, None, [SQUARE], config)
        own = model.model.embed_images(model.model.language_model.embed_tokens(ids), layout.spans, codes)
        embeds.append(own[:, -17:-1])
        assert layout.position_ids[0, 0, -17:-1].unique().tolist() == [4 if slots == 45 else 1]
    assert torch.equal(*embeds)
    (span,) = layout.spans
    assert span.final_only and span.num_codes == 0 and span.blocks == ((4, 4),)
    labels = torch.full((1, 30), -100)
    grids = torch.tensor([SQUARE])
    output = model(input_ids=ids, image_codes=codes, image_grids=grids, labels=ids, image_labels=labels)
    assert output.image_loss == 0 and output.loss.isfinite()


def test_scales_whose_final_block_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="could be the first of them"):
        small_model(context_image="final", levels=(2, 4))


def test_the_default_device_does_not_matter(model):
    """Positions are laid out on the CPU, wherever a caller has new tensors made."""
    ids = torch.tensor([image_tokens(model.config, SQUARE)])
    expected = layout_sequences(ids, None, [SQUARE], model.config)
    with torch.device("meta"):
        layout = layout_sequences(ids, None, [SQUARE], model.config)
    assert torch.equal(layout.position_ids, expected.position_ids) and layout.spans == expected.spans


def test_labels_come_in_the_order_of_the_images(model):
    """Whatever their shapes: rewards and log-probabilities are told apart by this order."""
    shapes = (WIDE, SQUARE, WIDE)
    ids = torch.tensor([[7, *(token for own in shapes for token in image_tokens(model.config, own))]])
    spans = layout_sequences(ids, None, shapes, model.config).spans
    counts = [sum(h * w for h, w in own) for own in shapes]
    codes = torch.full((3, max(counts)), -100)
    for image, count in enumerate(counts):
        codes[image, :count] = torch.arange(count)
    (rows, columns), labels, _, scales = model._labelled_slots(codes, spans, "cpu")
    assert labels.tolist() == [code for count in counts for code in range(count)]
    assert not rows.any() and columns.tolist() == [
        span.start + place for span, count in zip(spans, counts) for place in range(count)
    ]
    assert scales.tolist() == [k for own in shapes for k, (h, w) in enumerate(own) for _ in range(h * w)]


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_loss_by_hand(model):
    """Text shifted by one, codes aligned with their slots, weights 1 / (h w)^alpha of mean 1, summed 1:1."""
    model.config.scale_loss_alpha = 0.9
    batch = batch_of_images(model.config)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    image_labels = batch["image_codes"].masked_fill(batch["image_codes"] < 0, -100)
    output = model(**batch, labels=labels, image_labels=image_labels)
    logits = model(**batch).logits
    text, image, weights_of = [], [], []
    for row, (grids, start) in enumerate(((SQUARE, 3), (WIDE, 1))):
        n = sum(h * w for h, w in grids)
        own = torch.cat([torch.full((h * w,), float(h * w) ** -0.9) for h, w in grids])
        weights_of.append(own * n / own.sum())
        for j in range(n):
            image.append(F.cross_entropy(logits[row, start + j], image_labels[row, j] + 64))
        end = start + n  # <eoi>
        for t in range(logits.shape[1] - 1):
            # A slot predicts its code, and nothing predicts <eoi>: it is forced.
            if labels[row, t + 1] != -100 and not start <= t < end:
                text.append(F.cross_entropy(logits[row, t], labels[row, t + 1]))
    expected_image = (torch.stack(image) * torch.cat(weights_of)).mean()
    torch.testing.assert_close(output.image_loss, expected_image)
    torch.testing.assert_close(output.text_loss, torch.stack(text).mean())
    torch.testing.assert_close(output.loss, output.text_loss + output.image_loss)
    assert output.logits is None


def test_labels_at_pictures_without_codes_are_warned_of_once(model, monkeypatch):
    """Text alone would be learned, and nothing would say so."""
    batch, warnings = batch_of_images(model.config), []
    monkeypatch.setattr(modeling_nextflow.logger, "warning_once", warnings.append)
    codes = batch["image_codes"].masked_fill(batch["image_codes"] < 0, -100)
    model(**batch, labels=batch["input_ids"], image_labels=codes)
    model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100))
    assert not warnings
    model(**batch, labels=batch["input_ids"])
    assert "pictures are not" in warnings[0]


def test_labels_of_pictures_are_refused_where_the_head_is_passed_by(model):
    """As TRL's trainer does, which makes a loss of its own from the hidden states."""
    batch = batch_of_images(model.config)
    with pytest.raises(ValueError, match="NextFlowSFTTrainer"):
        model.model(**batch, image_labels=batch["image_codes"])
    looked_at = torch.full_like(batch["image_codes"], -100)
    assert model.model(**batch, image_labels=looked_at).last_hidden_state.isfinite().all()


def test_the_papers_weights_at_the_1024_level():
    """NextFlow Eq 2 at alpha = 0.9 (reference table of the weights)."""
    config = NextFlowConfig.from_preset("nextflow-7b", scale_loss_alpha=0.9)
    grids = config.schedule.grids_for_size(1024, 1024)
    holder = type("Holder", (), {"config": config})()
    weights, scales = NextFlowForConditionalGeneration._scale_weights(holder, grids)
    firsts = [weights[(scales == k).nonzero()[0, 0]].item() for k in range(18)]
    expected = [
        344,
        98.8,
        47.6,
        28.4,
        19.0,
        13.7,
        10.4,
        8.15,
        5.45,
        3.93,
        2.98,
        2.34,
        1.57,
        1.13,
        0.86,
        0.67,
        0.32,
        0.19,
    ]
    for own, printed in zip(firsts, expected):
        assert own == pytest.approx(printed, rel=0.02)
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-4)
    assert weights[scales < 8].sum().item() / 10084 == pytest.approx(0.359, abs=1e-3)


def test_prefix_training_equals_the_whole_pictures_coarse_scales(model):
    """A sequence that stops after scale 3 has the same hidden states as the whole one up to there."""
    batch = batch_of_images(model.config, grids=(SQUARE, SQUARE), text=((7,), (8,)), after=((9,), (9,)))
    whole = model.model(**batch).last_hidden_state[:, : 2 + 13]
    ids = batch["input_ids"][:, : 2 + 13]
    prefix = model.model(input_ids=ids, image_codes=batch["image_codes"], image_grids=batch["image_grids"])
    torch.testing.assert_close(prefix.last_hidden_state, whole, atol=1e-5, rtol=1e-5)
    loss = model(
        input_ids=ids,
        image_codes=batch["image_codes"],
        image_grids=batch["image_grids"],
        image_labels=batch["image_codes"],
    )
    assert loss.image_loss_per_scale[:3].isfinite().all() and loss.image_loss_per_scale[3].isnan()


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = small_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = batch_of_images(model.config)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append(model.model.connector.linear_1.weight.grad)
    torch.testing.assert_close(*gradients)


# ---- identity --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same_to_the_bit(model, tmp_path):
    model.config.codebook_fingerprint = model.vq_model.fingerprint()
    model.save_pretrained(tmp_path)
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = batch_of_images(model.config)
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_embeddings(tied, tmp_path):
    model = small_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_refuses_a_tokenizer_it_was_not_trained_with(model, tmp_path):
    model.config.codebook_fingerprint = model.vq_model.fingerprint()
    stranger = small_model(seed=5).vq_model
    with pytest.raises(ValueError, match="was trained with the image tokenizer"):
        model.set_vq_model(stranger)
    model.set_vq_model(model.vq_model)
    with torch.no_grad():
        model.vq_model.codebook.pixel.weight[3, 1] += 0.5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would draw noise"):
        NextFlowForConditionalGeneration.from_pretrained(tmp_path)


def test_flash_attention_is_refused_where_it_would_turn_causal(model):
    model.config.text_config._attn_implementation_internal = "flash_attention_2"
    batch = batch_of_images(model.config)
    with pytest.raises(ValueError, match="flash_attention_2.*both directions"):
        model.model(**batch)


def test_flash_attention_is_taken_where_it_is_exact(model):
    """One whole scale over a whole past without padding: no mask, and not causal."""
    model.config.text_config._attn_implementation_internal = "flash_attention_2"
    cache, embeds, kwargs = DynamicCache(), torch.zeros(1, 4, 32), {}
    block = torch.tensor([[-1, -1, 0, 0, 0, 0]])
    mask = model.model._attention_mask(embeds, torch.ones(1, 6), cache, block, None, kwargs)
    assert mask == {"full_attention": None} and kwargs == {"is_causal": False}
    for refused in (torch.tensor([[-1, -1, -1, 0, 0, 0]]), torch.tensor([[-1, -1, 0, 0, 1, 1]])):
        with pytest.raises(ValueError, match="both directions"):
            model.model._attention_mask(embeds, torch.ones(1, 6), cache, refused, None, {})
    with pytest.raises(ValueError, match="both directions"):
        model.model._attention_mask(embeds, torch.tensor([[0, 1, 1, 1, 1, 1]]), cache, block, None, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("image_grids"), "need `image_grids`"),
        (lambda b: b.update(image_codes=b["image_codes"][:1]), "Codes of 1 images"),
        (lambda b: b.update(image_grids=b["image_grids"][:1], image_codes=b["image_codes"][:1]), "2 begin-of-image"),
        (lambda b: b.update(image_codes=b["image_codes"] + 32), "Codes must lie in"),
        (lambda b: b.update(image_grids=b["image_grids"].flip(0)), "end within a scale|no schedule"),
        (
            lambda b: b["image_grids"].__setitem__((0, 2), torch.tensor([3, 2])),
            "image 0: These grids match no schedule",
        ),
        (lambda b: b["input_ids"].__setitem__((0, 5), 9), "outside an image|end within a scale"),
        (lambda b: [b.pop(k) for k in ("image_codes", "image_grids")], "neither `pixel_values` nor `image_codes`"),
        (lambda b: b.pop("input_ids"), "Give `input_ids`"),
        (lambda b: b.update(image_codes=b["image_codes"][:, :10]), "need .* codes an image"),
        (lambda b: b.update(image_labels=torch.full((2, 30), 99)), "Image labels must be codes"),
        (lambda b: b.update(image_labels=torch.zeros(1, 30, dtype=torch.long)), "Labels of 1 images"),
        (lambda b: b.update(image_labels=torch.zeros(2, 9, dtype=torch.long)), "there are 9 labels"),
    ],
)
def test_refuses_images_that_do_not_fit(model, change, message):
    batch = batch_of_images(model.config)
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_a_preset_has_as_many_codes_as_its_tokenizer():
    vq_config = NextFlowConfig.from_preset("nextflow-mini").vq_config.to_dict() | {"codebook_size": 2048}
    config = NextFlowConfig.from_preset("nextflow-mini", vq_config=vq_config)
    assert config.text_config.vocab_size == config.code_start_id + 2048


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NextFlowConfig(visual_input="pixels"), "visual_input"),
        (lambda: NextFlowConfig(context_image="all"), "context_image"),
        (lambda: NextFlowConfig(abilities=["fly"]), "abilities"),
        (lambda: NextFlowConfig.from_preset("nextflow-8b"), "no preset"),
        (lambda: small_config(code_start_id=70), "no room for 32 codes"),
        (lambda: NextFlowVQConfig(encoder_channels=[8, 8], decoder_channels=[8, 8]), "must agree"),
        (lambda: NextFlowVQConfig(encoder_channels=[8, 8]), "same number of levels"),
        (lambda: NextFlowVQConfig(sides=[1, 3, 2], levels=[3]), "strictly grow"),
    ],
)
def test_refuses_configurations_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- behind a cache --------------------------------------------------------------------------------------------------


def parted(model, attention: str, cut: int, pictures_before: int):
    """Scores of two rows, one left-padded, at once and in two parts, the second behind the cache of the first."""
    model.set_attn_implementation(attention)
    codes = torch.randint(32, (4, 30), generator=torch.Generator().manual_seed(0))
    grids = torch.tensor([[(1, 1), (2, 2), (3, 3), (4, 4)]] * 4)
    picture = [3, *[5] * 29, 4]
    ids = torch.tensor([[0, 0, 7, *picture, 8, 9, *picture, 10], [6, 7, 8, *picture, 8, 9, *picture, 11]])
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[2], [0]])).long()
    # Pictures come in order of row and column.
    early, late = [0, 2][: 2 * pictures_before], [1, 3] if pictures_before else [0, 1, 2, 3]
    whole = model(input_ids=ids, attention_mask=mask, image_codes=codes, image_grids=grids).logits
    first = {"image_codes": codes[early], "image_grids": grids[early]} if early else {}
    cache = model(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True, **first).past_key_values
    second = {"image_codes": codes[late], "image_grids": grids[late]}
    rest = model(input_ids=ids[:, cut:], attention_mask=mask, past_key_values=cache, use_cache=True, **second).logits
    return whole[:, cut:], rest


@pytest.mark.parametrize("attention", ["eager", "sdpa", "block_varlen"])
@pytest.mark.parametrize(("cut", "pictures_before"), [(3, 0), (35, 1)])
def test_pictures_behind_a_cache_are_seen_as_in_one_pass(attention, cut, pictures_before):
    whole, rest = parted(small_model().to(torch.float64), attention, cut, pictures_before)
    # Eager attention takes its softmax in float32.
    torch.testing.assert_close(rest, whole, atol=1e-5 if attention == "eager" else 1e-9, rtol=0)


def test_text_behind_the_cache_of_a_picture_goes_on_in_its_time():
    """Token by token, as a loop of one's own decodes, with no position given."""
    model = small_model().to(torch.float64)
    codes = torch.randint(32, (1, 30), generator=torch.Generator().manual_seed(0))
    images = {"image_codes": codes, "image_grids": torch.tensor([[(1, 1), (2, 2), (3, 3), (4, 4)]])}
    ids = torch.tensor([[7, 3, *[5] * 29, 4, 8, 9, 10]])
    whole = model(input_ids=ids, **images).logits
    output = model(input_ids=ids[:, :32], use_cache=True, **images)
    for place in range(32, 35):
        output = model(input_ids=ids[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
        torch.testing.assert_close(output.logits[:, 0], whole[:, place], atol=1e-9, rtol=0)
    # A second turn, by `generate`, with the first one's cache: with the pictures given again, and without.
    prompt = torch.tensor([[7, 3, *[5] * 29, 4, 8]])
    turn = torch.cat([prompt, torch.tensor([[12, 13]])], dim=1)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(turn, **images, **settings)
    for again in ({}, images):
        cache = model(input_ids=prompt, use_cache=True, **images).past_key_values
        assert torch.equal(model.generate(turn, past_key_values=cache, **again, **settings), expected)


def test_codes_stay_exact_in_half_precision(tmp_path):
    model = small_model()
    before = model.vq_model.fingerprint()
    model.config.codebook_fingerprint = before
    for narrow in (torch.float16, torch.bfloat16):
        own = copy.deepcopy(model).to(narrow)
        assert own.vq_model.fingerprint() == before and own.lm_head.weight.dtype == narrow
        own.save_pretrained(tmp_path / str(narrow))
        assert type(model).from_pretrained(tmp_path / str(narrow)).vq_model.fingerprint() == before


def test_a_vocabulary_may_grow_and_keeps_its_codes():
    model = small_model()
    ids = torch.tensor([[7, 8, 9]])
    before = model(input_ids=ids).logits
    model.resize_token_embeddings(106)
    torch.testing.assert_close(model(input_ids=ids).logits[..., :96], before)
    with pytest.raises(ValueError, match="would cut off image codes"):
        model.resize_token_embeddings(80)
