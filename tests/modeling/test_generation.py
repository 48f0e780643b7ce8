import queue
import threading

import pytest
import torch
from small_models import small_model
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor

from nextflow_hf.modeling.generation_nextflow import ImageSampling, ScaleStreamer, ramp, sample_codes
from nextflow_hf.modeling.masked_editing import KeptPicture, soft_edge

PROMPTS = {
    "input_ids": torch.tensor([[0, 0, 0, 7], [8, 9, 10, 11], [0, 12, 13, 14], [0, 0, 15, 16]]),
    "attention_mask": torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]),
}
SIZES = [(32, 32), (16, 16), (16, 48), (32, 32)]
DRAW = {"generation_mode": "image", "guidance_scale": 2.0, "temperature": 1.0, "top_k": 12, "top_p": 0.95, "seed": 7}


def draw(model, **overrides):
    return model.generate(**{**PROMPTS, "image_size": SIZES, **DRAW, **overrides})


def assert_same_pictures(first, second, atol=1e-5):
    for a, b in zip(first.codes, second.codes, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.log_probs, second.log_probs, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)
    for a, b in zip(first.images, second.images, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def exact_model(request):
    return small_model().to(request.param)


def test_sampling_may_change_from_scale_to_scale():
    sampling = ImageSampling(0.0, temperature=[1.0, 0.5, 0.0], top_k=7, top_p=[0.9])
    assert [sampling.at(scale).temperature for scale in range(5)] == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert sampling.at(4) == ImageSampling(0.0, 0.0, 7, 0.9)
    model = small_model()
    first_alone = [draw(model, temperature=[1.0, 0.0], top_k=0, top_p=1.0, seed=seed) for seed in (1, 2)]
    greedy = draw(model, temperature=0.0, seed=1)
    for row in range(4):
        firsts = [int(own.codes[row][0]) for own in first_alone]
        # What follows the first code is decided by it.
        assert (firsts[0] == firsts[1]) == torch.equal(first_alone[0].codes[row], first_alone[1].codes[row])
        assert torch.equal(first_alone[0].codes[row], greedy.codes[row]) or firsts[0] != int(greedy.codes[row][0])
    assert any(not torch.equal(a, b) for a, b in zip(first_alone[0].codes, first_alone[1].codes))


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
def test_static_dynamic_and_no_cache_agree(exact_model, guidance_scale):
    dynamic = draw(exact_model, guidance_scale=guidance_scale)
    assert_same_pictures(dynamic, draw(exact_model, guidance_scale=guidance_scale, cache_implementation="static"))
    assert_same_pictures(dynamic, draw(exact_model, guidance_scale=guidance_scale, use_cache=False))


def test_a_head_that_is_wrapped_is_called(exact_model):
    """As an offloaded one or one with an adapter must be."""
    plain = draw(exact_model)
    calls = []
    exact_model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    assert_same_pictures(plain, draw(exact_model))
    assert calls


def test_a_batch_of_unequal_prompts_and_sizes_equals_one_by_one(exact_model):
    together = draw(exact_model)
    for row in range(4):
        start = int((PROMPTS["attention_mask"][row] == 0).sum())
        alone = exact_model.generate(
            PROMPTS["input_ids"][row : row + 1, start:], image_size=SIZES[row], **{**DRAW, "seed": 7 + row}
        )
        assert torch.equal(alone.codes[0], together.codes[row])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[row], atol=1e-5, rtol=0)
        assert alone.images[0].shape == (3, *SIZES[row])


@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
def test_recorded_log_probabilities_equal_a_teacher_forced_pass(exact_model, guidance_scale):
    drawn = draw(exact_model, guidance_scale=guidance_scale)
    config = exact_model.config
    for row, grids in enumerate(drawn.grids):
        slots = sum(h * w for h, w in grids[1:])
        prompt = PROMPTS["input_ids"][row][PROMPTS["attention_mask"][row] > 0].tolist()
        ids = torch.tensor([[*prompt, config.boi_token_id, *[config.image_token_id] * slots]])
        logits = exact_model(
            input_ids=ids, image_codes=drawn.codes[row][None], image_grids=torch.tensor([grids])
        ).logits[0, len(prompt) :, 64:]
        expected = logits.log_softmax(dim=-1).gather(-1, drawn.codes[row][:, None])[:, 0]
        torch.testing.assert_close(drawn.log_probs[row].to(expected), expected, atol=1e-5, rtol=0)


def test_greedy_drawing_equals_teacher_forced_argmax():
    model = small_model(visual_input="accumulated")
    drawn = model.generate(
        torch.tensor([[7, 8]]), generation_mode="image", image_size=(32, 32), guidance_scale=0, top_k=1
    )
    ids = torch.tensor([[7, 8, 3, *[5] * 29]])
    logits = model(input_ids=ids, image_codes=drawn.codes[0][None], image_grids=torch.tensor([drawn.grids[0]])).logits
    assert torch.equal(logits[0, 2:, 64:].argmax(-1), drawn.codes[0])


def test_seed_decides_and_nothing_else():
    model = small_model()
    first, again, other = draw(model), draw(model), draw(model, seed=8)
    assert_same_pictures(first, again, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(first.codes, other.codes))
    torch.manual_seed(99)
    assert_same_pictures(first, draw(model), atol=0)
    by_generators = draw(model, seed=None, generator=[torch.Generator().manual_seed(7 + row) for row in range(4)])
    assert_same_pictures(first, by_generators, atol=0)


def test_guidance_ramps_from_nothing_to_full():
    assert [ramp(6.0, k, 4) for k in range(4)] == [0, 2, 4, 6]
    model = small_model()
    weak, strong = draw(model, guidance_scale=0.0), draw(model, guidance_scale=8.0)
    for a, b in zip(weak.codes, strong.codes):
        assert a[0] == b[0]  # the first scale is unguided
    assert any(not torch.equal(a, b) for a, b in zip(weak.codes, strong.codes))


def test_a_negative_prompt_takes_the_place_of_no_prompt():
    model = small_model()
    ids = torch.tensor([[20, 21, 22, 23, 24, 25]])
    negative = draw(model, negative_prompt_ids=ids)
    assert any(not torch.equal(a, b) for a, b in zip(negative.codes, draw(model).codes))
    alone = model.generate(
        PROMPTS["input_ids"][1:2], image_size=SIZES[1], negative_prompt_ids=ids, **{**DRAW, "seed": 8}
    )
    assert torch.equal(alone.codes[0], negative.codes[1])


class Telling(LogitsProcessor):
    """Two rows, told apart by their first tokens after padding: one chooses a picture at once, the other writes on."""

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -100.0)
        for row, ids in enumerate(input_ids.tolist()):
            chooses = 9 in ids or ids.count(11) == 4
            scores[row, 3 if chooses else 11] = 0
        return scores


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"pad_token_id": 6},
        {"eos_token_id": None},
    ],
)
@pytest.mark.parametrize("with_pictures", [False, True])
def test_texts_of_a_batch_are_those_of_its_rows(settings, with_pictures):
    """One row asks for a picture while the other goes on with its text; with pictures in the prompts and without."""
    model = small_model(context_image="final", levels=(3, 4))
    picture = [3, *[5] * 16, 4] if with_pictures else []
    rows = [[7, *picture, 9], [7, 8, *picture, 8]]
    codes = torch.randint(0, 20, (2, 30), generator=torch.Generator().manual_seed(0))
    grids = torch.tensor([[[1, 1], [2, 2], [3, 3], [4, 4]]] * 2)

    def answer(chosen):
        length = max(map(len, chosen))
        ids = torch.tensor([[0] * (length - len(own)) + own for own in chosen])
        mask = torch.tensor([[0] * (length - len(own)) + [1] * len(own) for own in chosen])
        places = [rows.index(own) for own in chosen]
        images = {"image_codes": codes[places], "image_grids": grids[places]} if with_pictures else {}
        return model.generate(
            ids, attention_mask=mask, **images, generation_mode="interleaved", image_size=(32, 32), max_images=1,
            max_new_tokens=6, seed=[1 + place for place in places], logits_processor=[Telling()], do_sample=False,
            image_guidance_scale=0.0, **settings,
        )  # fmt: skip

    together, alone = answer(rows), [answer([own]) for own in rows]
    assert [len(own) for own in together.segments] == [1, 2]
    assert together.segments[1][0].tolist() == [11] * 4
    for row in range(2):
        (expected,) = alone[row].segments
        for one, other in zip(together.segments[row], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_interleaved_answers_are_one_for_each_prompt():
    for settings in ({"num_return_sequences": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match="one answer for each prompt"):
            small_model().generate(torch.tensor([[7, 8]]), generation_mode="interleaved", **settings)
    with pytest.raises(ValueError, match=r"does not take \['best_of', 'streamer'\]"):
        small_model().generate(
            torch.tensor([[7, 8]]), generation_mode="interleaved", best_of=2, streamer=ScaleStreamer()
        )


@pytest.mark.parametrize(("context_image", "slots"), [("scales", 29), ("scales+final", 45), ("final", 16)])
def test_images_in_the_prompt_are_seen_and_batch_like_alone(context_image, slots):
    model = small_model(context_image=context_image, levels=(3, 4))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = [3, *[5] * slots, 4]
    ids = torch.tensor([[0, 7, *image, 8], [9, 10, *image, 11]])
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[1], [0]])).long()
    kwargs = {**DRAW, "image_size": (32, 32)}
    together = model.generate(ids, attention_mask=mask, pixel_values=pixels, **kwargs)
    uncached = model.generate(ids, attention_mask=mask, pixel_values=pixels, use_cache=False, **kwargs)
    assert all(map(torch.equal, together.codes, uncached.codes))
    alone = model.generate(ids[1:], pixel_values=pixels[1:], **{**kwargs, "seed": 8})
    assert torch.equal(alone.codes[0], together.codes[1])
    other = model.generate(ids[1:], pixel_values=pixels[:1], **{**kwargs, "seed": 8})
    assert (other.log_probs[0] - alone.log_probs[0]).abs().max() > 1e-4


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_follows_the_filtered_distribution():
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -9.0])
    uniforms = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    sampling = ImageSampling(temperature=0.8, top_k=4, top_p=0.9)
    codes = sample_codes(scores.expand(20000, -1), uniforms, sampling)
    probabilities = (scores[:4] / 0.8).softmax(-1)
    kept = probabilities.cumsum(-1) - probabilities < 0.9
    expected = torch.where(kept, probabilities, 0)
    expected = expected / expected.sum()
    frequencies = torch.bincount(codes, minlength=6)[:4] / 20000
    torch.testing.assert_close(frequencies, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 1e-16])
def test_sampling_never_leaves_what_top_p_kept(uniform):
    scores = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    codes = sample_codes(scores, torch.full((64,), uniform, dtype=torch.float64), ImageSampling(top_k=0, top_p=0.3))
    order = scores.softmax(-1).sort(dim=-1, descending=True)
    kept = (order.values.cumsum(-1) - order.values < 0.3).sum(-1)
    rank = (order.indices == codes[:, None]).nonzero()[:, 1]
    assert (rank < kept).all()


def test_zero_temperature_and_top_1_are_greedy():
    scores = torch.randn(9, 32)
    for sampling in (ImageSampling(temperature=0.0), ImageSampling(top_k=1)):
        assert torch.equal(sample_codes(scores, torch.rand(9), sampling), scores.argmax(-1))


def test_sampling_defaults_come_from_the_checkpoint(tmp_path):
    model = small_model()
    model.generation_config = GenerationConfig(image_guidance_scale=0.0, image_top_k=1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    plain = loaded.generate(**PROMPTS, generation_mode="image", image_size=SIZES)
    explicit = draw(model, guidance_scale=0.0, top_k=1)
    assert_same_pictures(plain, explicit)


def test_a_given_generation_config_stands_before_the_checkpoints_and_behind_keywords():
    model = small_model()
    model.generation_config = GenerationConfig(image_guidance_scale=0.0, image_top_k=3, image_temperature=0.5)
    given = GenerationConfig(image_top_k=1, image_top_p=0.9, max_new_tokens=5)
    call = {**PROMPTS, "generation_mode": "image", "image_size": SIZES, "seed": 7, "generation_config": given}
    explicit = draw(model, guidance_scale=0.0, top_k=1, temperature=0.5, top_p=0.9)
    assert_same_pictures(model.generate(**call), explicit)
    other = draw(model, guidance_scale=0.0, top_k=9, temperature=0.5, top_p=0.9)
    assert_same_pictures(model.generate(**call, top_k=9), other)
    assert any(not torch.equal(*own) for own in zip(explicit.codes, other.codes))
    with pytest.raises(ValueError, match="must be a `GenerationConfig`, got dict"):
        model.generate(**{**call, "generation_config": {"image_top_k": 1}})


def test_interleaved_generation_takes_a_generation_config():
    model = small_model()
    with torch.no_grad():
        # Begin-of-image is certain to come.
        model.lm_head.weight[3] = 0
        model.lm_head.weight[:64] *= 1e-3
    given = GenerationConfig(image_guidance_scale=0.0, image_top_k=1, max_new_tokens=4, eos_token_id=2, do_sample=True)
    call = {"generation_mode": "interleaved", "image_size": (16, 16), "seed": 7, "generation_config": given}
    torch.manual_seed(0)
    out = model.generate(torch.tensor([[7, 8]]), **call)
    # The tokens that ask for pictures count, but are no text.
    texts = [own for own in out.segments[0] if not own.is_floating_point()]
    assert sum(map(len, texts)) + len(out.codes[0]) <= 4
    torch.manual_seed(0)
    named = {**call, "image_guidance_scale": 0.0, "image_top_k": 1, "max_new_tokens": 4, "do_sample": True}
    model.generation_config.eos_token_id = 2
    del named["generation_config"]
    again = model.generate(torch.tensor([[7, 8]]), **named)
    assert len(out.segments[0]) == len(again.segments[0])
    assert all(torch.equal(*own) for own in zip(out.segments[0], again.segments[0]))
    longer = model.generate(torch.tensor([[7, 8]]), **call, max_new_tokens=30, suppress_tokens=[2, 3])
    assert len(longer.segments[0][0]) == 30
    with pytest.raises(ValueError, match="num_return_sequences"):
        given.num_return_sequences = 2
        model.generate(torch.tensor([[7, 8]]), **call)


# ---- watching --------------------------------------------------------------------------------------------------------


def test_callback_and_streamer_get_every_scale():
    model = small_model()
    steps = []
    streamer = ScaleStreamer(timeout=30)
    thread = threading.Thread(
        target=draw, args=(model,), kwargs={"streamer": streamer, "callback_on_scale_end": steps.append}
    )
    thread.start()
    streamed = list(streamer)
    thread.join()
    assert [step.scale for step in streamed] == [step.scale for step in steps] == [0, 1, 2, 3]
    final = draw(model)
    assert all(torch.equal(a, b) for a, b in zip(steps[-1].codes, final.codes))
    previews = steps[1].preview()
    assert [tuple(image.shape) for image in previews] == [(3, *size) for size in SIZES]
    torch.testing.assert_close(steps[-1].preview()[0], final.images[0])


def test_a_callback_can_stop():
    drawn = draw(small_model(), image_size=(32, 32), callback_on_scale_end=lambda step: step.scale < 2)
    assert all(len(codes) == 1 + 4 + 9 for codes in drawn.codes)
    assert all(image.shape == (3, 32, 32) for image in drawn.images)


def test_a_streamer_nobody_feeds_times_out():
    with pytest.raises(queue.Empty):
        next(ScaleStreamer(timeout=0.01))


# ---- text and both ---------------------------------------------------------------------------------------------------


def test_text_never_contains_codes_or_image_tokens():
    model = small_model()
    out = model.generate(**PROMPTS, max_new_tokens=24, do_sample=True)[:, 4:]
    assert (out < 64).all() and not torch.isin(out, torch.tensor([3, 4, 5])).any()


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_text_after_an_image_continues_its_time(cache):
    """Greedy text after a picture, with any cache and without, equals the argmax of full passes."""
    model = small_model()
    codes = torch.randint(32, (2, 30), generator=torch.Generator().manual_seed(0))
    grids = torch.tensor([[(1, 1), (2, 2), (3, 3), (4, 4)]] * 2)
    ids = torch.tensor([[0, 7, 3, *[5] * 29, 4, 8], [9, 10, 3, *[5] * 29, 4, 11]])
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[1], [0]])).long()
    out = model.generate(
        ids, attention_mask=mask, image_codes=codes, image_grids=grids, max_new_tokens=6, do_sample=False,
        eos_token_id=-1, **cache,
    )  # fmt: skip
    for _ in range(6):
        logits = model(
            input_ids=ids, attention_mask=mask, image_codes=codes, image_grids=grids, logits_to_keep=1
        ).logits[:, -1]
        logits[:, 64:] = -torch.inf
        logits[:, [3, 4, 5]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    assert torch.equal(out, ids)


def test_beams_and_further_answers_see_all_pictures_of_their_prompt():
    """Prompts of two, no and one picture."""
    model = small_model()
    codes = torch.randint(32, (3, 30), generator=torch.Generator().manual_seed(0))
    grids = torch.tensor([[(1, 1), (2, 2), (3, 3), (4, 4)]] * 3)
    picture = [3, *[5] * 29, 4]
    prompts = [[*picture, 9, *picture, 8], [7, 8, 9, 10, 11], [12, *picture, 13]]
    mask = torch.tensor([[0] * (64 - len(own)) + [1] * len(own) for own in prompts])
    images = {"image_codes": codes, "image_grids": grids}
    settings = {"max_new_tokens": 5, "eos_token_id": -1, **images}
    ids = torch.tensor([[0] * (64 - len(own)) + own for own in prompts])
    greedy = model.generate(ids, attention_mask=mask, do_sample=False, **settings)
    several = model.generate(ids, attention_mask=mask, do_sample=True, top_k=1, num_return_sequences=2, **settings)
    assert torch.equal(several, greedy.repeat_interleave(2, dim=0))
    together = model.generate(ids, attention_mask=mask, do_sample=False, num_beams=3, **settings)
    for row, own in enumerate(([0, 1], [], [2])):
        alone = {name: value[own] for name, value in images.items()} if own else {}
        beams = model.generate(
            ids[row : row + 1],
            attention_mask=mask[row : row + 1],
            do_sample=False,
            num_beams=3,
            **{**settings, "image_codes": None, "image_grids": None, **alone},
        )
        assert torch.equal(beams[0], together[row])


def test_pixels_alone_tell_their_scales():
    model = small_model()
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = torch.tensor([[7, 3, *[5] * 29, 4, 8]])
    grids = torch.tensor([[(1, 1), (2, 2), (3, 3), (4, 4)]])
    settings = {"pixel_values": pixels, "max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    for more in ({}, {"num_beams": 2}):
        told = model.generate(ids, image_grids=grids, **settings, **more)
        assert torch.equal(model.generate(ids, **settings, **more), told)
    with pytest.raises(ValueError, match="image placeholders, but neither"):
        model.generate(ids, max_new_tokens=2)


def test_learned_prompts_are_refused_where_they_would_be_ignored():
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(small_model(), config)
    ids = torch.tensor([[7, 8]])
    assert model.generate(input_ids=ids, max_new_tokens=2, eos_token_id=-1).shape == (1, 4)
    for mode in ("image", "interleaved"):
        with pytest.raises(ValueError, match="reach text alone"):
            model.generate(input_ids=ids, generation_mode=mode)


def test_interleaved_alternates_and_stops():
    model = small_model()
    with torch.no_grad():
        # Begin-of-image is certain to come: after any token the model wants a picture.
        model.lm_head.weight[3] = 0
    model.generation_config.eos_token_id = 2
    out = model.generate(
        torch.tensor([[7, 8]]), generation_mode="interleaved", image_size=(32, 32), seed=1, max_images=2,
        max_new_tokens=40, do_sample=True, image_guidance_scale=0.0, image_top_k=5,
    )  # fmt: skip
    (segments,) = out.segments
    pictures = [segment for segment in segments if segment.is_floating_point()]
    texts = [segment for segment in segments if not segment.is_floating_point()]
    assert len(pictures) == len(out.codes[0]) <= 2
    assert all(picture.shape == (3, 32, 32) for picture in pictures)
    assert sum(map(len, texts)) <= 40 and all((text < 64).all() for text in texts)
    assert len(segments) > 0


def test_interleaved_pictures_equal_image_mode_on_the_same_prefix():
    model = small_model(seed=3)
    model.generation_config.eos_token_id = 2
    forced = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        # Begin-of-image is as likely as whatever the text would go on with.
        model.lm_head.weight[3] = model.lm_head.weight[:64][model(forced).logits[0, -1, :64].argmax()]
    torch.manual_seed(0)
    out = model.generate(
        forced, generation_mode="interleaved", image_size=(32, 32), seed=5, max_images=1, max_new_tokens=30,
        do_sample=True, temperature=3.0, image_guidance_scale=0.0, image_top_k=5,
    )  # fmt: skip
    segments = out.segments[0]
    assert len(out.codes[0]) == 1, "the text must ask for a picture for this test to say anything"
    text = segments[0] if not segments[0].is_floating_point() else torch.empty(0, dtype=torch.long)
    prefix = torch.cat([forced[0], text])[None]
    alone = model.generate(prefix, generation_mode="image", image_size=(32, 32), seed=5, guidance_scale=0.0, top_k=5)
    assert torch.equal(alone.codes[0], out.codes[0][0])


@pytest.mark.parametrize(("context_image", "slots"), [("scales", 29), ("scales+final", 45), ("final", 45)])
def test_text_behind_a_drawn_picture_sees_its_finest_codes(context_image, slots, monkeypatch):
    model = small_model(context_image=context_image, levels=(3, 4))
    rows = []

    def write(self, input_ids, **kwargs):
        """Text that asks for a picture, then ends the turn."""
        rows.append(input_ids[0].tolist())
        return torch.cat([input_ids, torch.tensor([[9, 3 if len(rows) == 1 else 2]])], dim=1)

    monkeypatch.setattr(GenerationMixin, "generate", write)
    model.generate(
        torch.tensor([[7, 8]]), generation_mode="interleaved", image_size=(32, 32), seed=1, image_guidance_scale=0.0
    )
    assert rows == [[7, 8], [7, 8, 9, 3, *[5] * slots, 4]]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"temperature": -0.5}, "temperature"),
        ({"top_k": -3}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"image_size": (32, -32)}, "positive"),
        ({"image_size": (30, 32)}, "multiple of 8"),
        ({"image_size": (32, 32, 3)}, "height, width"),
        ({"image_size": (32.0, 32)}, "whole pixels|sizes for 4 prompts"),
        ({"image_size": [(32, 32)]}, "1 sizes for 4 prompts"),
        ({"seed": [1, 2]}, "2 seeds"),
        ({"generator": torch.Generator()}, "not both"),
        ({"generation_mode": "video"}, "generation_mode"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"num_beams": 4}, "does not know.*num_beams"),
        ({"input_ids": torch.zeros(4, 0, dtype=torch.long), "attention_mask": None}, "at least one token"),
        ({"input_ids": torch.full((4, 4), 96)}, "Token ids"),
        ({"attention_mask": torch.ones(4, 3)}, "does not fit"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]] * 4)}, "padded on the left"),
        ({"negative_prompt_ids": torch.ones(2, 3, dtype=torch.long)}, "2 negative prompts"),
    ],
)
def test_refuses_mistaken_calls(overrides, message):
    with pytest.raises(ValueError, match=message):
        draw(small_model(), **overrides)


@pytest.mark.parametrize(
    ("abilities", "kwargs", "needed"),
    [
        (["caption"], {"generation_mode": "image"}, "image"),
        (["image"], {"generation_mode": "text"}, "text"),
        (["image"], {"generation_mode": "interleaved"}, "interleaved"),
        (["image", "text"], {"pixel_values": torch.zeros(1, 3, 32, 32)}, "caption"),
        (["image"], {"generation_mode": "image", "pixel_values": torch.zeros(1, 3, 32, 32)}, "edit"),
    ],
)
def test_refuses_by_name_what_the_checkpoint_was_not_trained_for(abilities, kwargs, needed):
    model = small_model(abilities=abilities)
    with pytest.raises(ValueError, match=f"not trained for '{needed}'"):
        model.generate(**PROMPTS, **kwargs)


def test_refuses_sizes_the_checkpoint_was_not_trained_for():
    model = small_model(trained_image_sizes=[[32, 32]])
    with pytest.raises(ValueError, match="trained to draw"):
        draw(model, image_size=(16, 48))
    assert draw(model, image_size=None).images[0].shape == (3, 32, 32)


# ---- masked editing --------------------------------------------------------------------------------------------------


def edit_inputs(seed=0):
    """Two prompts with a picture each."""
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    image = [3, *[5] * 29, 4]
    ids = torch.tensor([[7, 6, *image, 8], [9, 10, *image, 11]])
    return {"input_ids": ids, "pixel_values": pixels}


def left_half():
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    return mask


def test_a_mask_keeps_the_rest_to_the_pixel():
    model = small_model()
    inputs = edit_inputs()
    out = model.generate(**inputs, **DRAW, mask=left_half())
    free = model.generate(**inputs, **DRAW, image_size=(32, 32))
    for own, before, other in zip(out.images, inputs["pixel_values"], free.images):
        # One cell of the finest scale is 8 pixels.
        assert torch.equal(own[..., 24:], before[..., 24:])
        assert not torch.equal(own[..., :16], before[..., :16])
        assert not torch.equal(own, other)


def test_a_mask_keeps_codes_while_nothing_coarser_has_changed():
    model = small_model()
    inputs = edit_inputs()
    codes, grids = model.model.encode_images(inputs["pixel_values"])
    kept = KeptPicture(model.vq_model, codes[0], grids[0], left_half() > 0)
    own = model.vq_model.split_codes(codes[:1], grids[0])
    # Drawn as it was, nothing changes; drawn otherwise on the left, the right still has codes of the picture.
    for scale, scale_codes in enumerate(own):
        assert torch.equal(kept.constrain(scale_codes.flatten(), scale), scale_codes.flatten())
    other = KeptPicture(model.vq_model, codes[0], grids[0], left_half() > 0)
    for scale, scale_codes in enumerate(own[:2]):
        drawn = scale_codes.flatten() if scale == 0 else (scale_codes.flatten() + 1) % 32
        constrained = other.constrain(drawn, scale).view(grids[0][scale])
        if scale == 1:
            assert torch.equal(constrained[:, 1], scale_codes[0, :, 1])
            assert torch.equal(constrained[:, 0], drawn.view(2, 2)[:, 0])


def test_the_edge_is_soft():
    mask = torch.zeros(6, 12, dtype=torch.bool)
    mask[:, :2] = True
    assert soft_edge(mask, 4)[3].tolist() == [1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(16, 16), "32x32 pixels"),
        (torch.zeros(32, 32), "mask is empty"),
        (torch.ones(3, 32, 32), "each of the 2 prompts"),
    ],
)
def test_refuses_masks_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        small_model().generate(**edit_inputs(), **DRAW, mask=mask)


def test_refuses_a_mask_without_a_picture():
    with pytest.raises(ValueError, match="must hold the picture"):
        small_model().generate(**PROMPTS, **DRAW, mask=left_half())


def test_given_first_scales_are_kept_and_the_rest_is_drawn_from_them():
    model = small_model()
    whole = draw(model, image_size=(32, 32))
    prefix = torch.stack([own[:5] for own in whole.codes])
    again = draw(model, image_size=(32, 32), prefix_codes=prefix)
    assert_same_pictures(whole, again, atol=0)
    other = draw(model, image_size=(32, 32), prefix_codes=(prefix + 1) % 32)
    for row, codes in enumerate(other.codes):
        assert torch.equal(codes[:5], (prefix[row] + 1) % 32)
        assert not torch.equal(other.log_probs[row][5:], whole.log_probs[row][5:])
    # The log-probabilities of given codes are the model's too.
    torch.testing.assert_close(again.log_probs[0][:5], whole.log_probs[0][:5])
    with pytest.raises(ValueError, match="whole scales"):
        draw(model, image_size=(32, 32), prefix_codes=prefix[:, :4])
    with pytest.raises(ValueError, match="Codes must lie"):
        draw(model, image_size=(32, 32), prefix_codes=prefix + 32)


def test_first_scales_are_those_of_the_whole_picture_in_a_size_of_their_own():
    model = small_model()
    model.config.vq_config.prefix_scales = [2, 3]
    settings = {"image_size": (32, 32), "num_scales": 3}
    whole, steps = draw(model, image_size=(32, 32)), []
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        first = draw(model, **settings, **cache, callback_on_scale_end=steps.append)
        for row in range(4):
            assert torch.equal(first.codes[row], whole.codes[row][:14]) and first.images[row].shape == (3, 24, 24)
            torch.testing.assert_close(first.log_probs[row], whole.log_probs[row][:14])
            own = model.vq_model.decode(first.codes[row][None], whole.grids[row][:3])[0]
            torch.testing.assert_close(first.images[row], own)
    assert [step.scale for step in steps] == [0, 1, 2] * 3 and {step.num_scales for step in steps} == {3}
    assert steps[1].preview()[0].shape == (3, 24, 24)
    begun = draw(model, **settings, prefix_codes=torch.stack([own[:5] for own in whole.codes]))
    assert all(torch.equal(own, codes[:14]) for own, codes in zip(begun.codes, whole.codes))
    best = draw(model, **settings, best_of=2, scorer=lambda images: [own.mean() for own in images])
    assert all(len(own) == 14 for own in best.codes)
    for changes, message in (
        ({"num_scales": 1}, "shows the first 2 or 3 "),
        ({"num_scales": 2, "image_size": (16, 16)}, "16x16 has 2"),
        ({"image_size": (16, 48)}, "for square pictures"),
        ({"generation_mode": "interleaved"}, "does not take"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(model, **{**settings, **changes})
    with pytest.raises(ValueError, match="a `mask` or `num_scales`"):
        model.generate(**edit_inputs(), **DRAW, mask=left_half(), num_scales=2)
    with pytest.raises(ValueError, match="was not trained to show first scales"):
        draw(small_model(), **settings)
    with pytest.raises(ValueError, match="numbers of the first of 4 scales"):
        type(model.config.vq_config)(**{**model.config.vq_config.to_dict(), "prefix_scales": [4]})


def test_the_best_of_several_pictures_is_kept_for_each_prompt():
    model = small_model()

    def brightness(images):
        return [image.mean() for image in images]

    best = draw(model, best_of=3, scorer=brightness)
    turns = [draw(model, seed=[7 + row + 1_000_003 * turn for row in range(4)]) for turn in range(3)]
    for row in range(4):
        winner = max(turns, key=lambda own: own.images[row].mean())
        assert torch.equal(best.codes[row], winner.codes[row]) and torch.equal(best.images[row], winner.images[row])
        torch.testing.assert_close(best.log_probs[row], winner.log_probs[row])
    with pytest.raises(ValueError, match="both `scorer` and `best_of`"):
        draw(model, best_of=3)
    with pytest.raises(ValueError, match="finite numbers"):
        draw(model, best_of=1, scorer=lambda images: [float("nan")] * len(images))
