"""TokenFlow's models against what the reference implementation made with the same weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenflow_models import (
    GOLDEN,
    TINY_PAD,
    golden,
    tiny_t2i,
    tiny_tokenizer,
    variant_shapes,
    weight_by_rule,
)

from nextflow_hf.modeling.configuration_tokenflow import TokenFlowConfig
from nextflow_hf.modeling.convert_tokenflow import (
    TOKENIZERS,
    t2i_rules,
    tokenizer_config,
    tokenizer_rules,
    tokenizer_variant,
)
from nextflow_hf.modeling.generation_nextflow import ImageSampling, kept_probabilities
from nextflow_hf.modeling.modeling_nextflow_vq import NextFlowVQModel
from nextflow_hf.modeling.modeling_tokenflow import TokenFlowForImageGeneration
from nextflow_hf.modeling.weight_conversion import apply_rules, check_rules
from nextflow_hf.processing.processing_nextflow import to_picture


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def t2i():
    return tiny_t2i()


@pytest.fixture(scope="module")
def expected():
    return golden("tokenflow_t2i")[1]


def close(found, expected, atol):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tokenizer_gives_the_reference_s_features_codes_and_pictures(tokenizer):
    _, reference = golden("tokenflow_tokenizer")
    pixels, codes = reference["pixel_values"], reference["indices"].long()
    close(tokenizer.semantic_features(pixels), reference["clip_patch_features"], 1e-5)
    latents, _ = tokenizer.latents(pixels)
    close(latents[:, :32].flatten(2).transpose(1, 2), reference["semantic_feature_blc"], 1e-5)
    close(latents[:, 32:], reference["pixel_feature_bchw"], 1e-5)
    encoding = tokenizer.encode(pixels)
    assert torch.equal(encoding.codes, codes)
    close(encoding.features, reference["quantized"], 1e-5)
    close(tokenizer.sum_features(codes, encoding.grids), reference["quantized"], 1e-5)
    close(tokenizer.semantic_decoder(reference["quantized"][:, :32]), reference["decoded_semantic"], 1e-5)
    close(tokenizer.decode_features(reference["quantized"]), reference["decoded_image_from_codes"], 1e-4)


def test_tokenizer_takes_its_one_size_alone_and_trains_at_it(tokenizer):
    with pytest.raises(ValueError, match="256x256 pixels alone"):
        tokenizer.encode(torch.zeros(1, 3, 224, 224))
    pixels = torch.zeros(1, 3, 256, 256)
    with pytest.raises(ValueError, match="semantic_targets"):
        tokenizer(pixels)
    output = tokenizer(pixels, semantic_targets=torch.ones(1, 256, 48))
    assert output.reconstruction.shape == pixels.shape and torch.isfinite(output.loss)


def test_tokenizer_is_the_same_when_it_was_saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = NextFlowVQModel.from_pretrained(tmp_path).eval()
    for name, own in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], own), name
    pixels = golden("tokenflow_tokenizer")[1]["pixel_values"]
    assert torch.equal(again.encode(pixels).codes, tokenizer.encode(pixels).codes)


@pytest.mark.parametrize(
    ("variant", "named", "millions"),
    [("clipb_224", "clipb_224", 181.9), ("clipb_224_enhanced_interp", "clipb_256", 376.6), ("siglip_384", None, 523.5)],
)
def test_every_published_weight_is_used_or_dropped_by_name(variant, named, millions):
    shapes = variant_shapes()[variant]
    named = named or tokenizer_variant(shapes)
    config = tokenizer_config(shapes, TOKENIZERS[named])
    rules, dropped = tokenizer_rules(config)
    with torch.device("meta"):
        model = NextFlowVQModel(config)
    target = {name: tuple(own.shape) for name, own in model.state_dict().items()}
    check_rules(rules, dropped, shapes, target)
    assert sum(own.numel() for own in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    name = next(iter(shapes))
    with pytest.raises(ValueError, match=f"1 weights are missing: {name}"):
        check_rules(rules, dropped, {key: own for key, own in shapes.items() if key != name}, target)
    with pytest.raises(ValueError, match="1 weights are not known: encoder.new"):
        check_rules(rules, dropped, {**shapes, "encoder.new": (3,)}, target)
    with pytest.raises(ValueError, match=rf"1 weights have another shape: {name} \(1, 2\) does not give"):
        check_rules(rules, dropped, {**shapes, name: (1, 2)}, target)


def test_vitamin_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="ViTamin"):
        tokenizer_variant(variant_shapes()["vitamin_xlarge_256"])
    with pytest.raises(ValueError, match="not the weights of a TokenFlow tokenizer"):
        tokenizer_variant({"lm_head.weight": (3, 4)})


@torch.no_grad()
def test_siglip_tokenizer_at_full_size():
    """Half a billion weights by rule; the file holds the reference's codes and every fourth pixel."""
    variants = variant_shapes()
    enhanced = {name: own for name, own in variants["clipb_224_enhanced_interp"].items() if name.startswith("decoder.")}
    plain = {name: own for name, own in variants["siglip_384"].items() if not name.startswith("decoder.")}
    shapes = {**plain, **enhanced}
    config = tokenizer_config(shapes, TOKENIZERS["siglip_384"])
    rules, _ = tokenizer_rules(config)
    torch.set_num_threads(2)
    model = NextFlowVQModel(config).eval()
    own = model.state_dict()
    for name, tensor in apply_rules(rules, lambda name: weight_by_rule(name, shapes[name])):
        own[name].copy_(tensor)
    reference = load_file(GOLDEN / "tokenflow_siglip384.safetensors")
    codes = reference["codes"].long()
    encoding = model.encode(reference["pixel_values"])
    assert (encoding.codes == codes).float().mean() >= 0.995
    features = model.sum_features(codes, encoding.grids)
    close(model.semantic_decoder(features[:, :32])[:, :8], reference["decoded_semantic"], 1e-4)
    pixels = reference["decoded_pixels"]
    close(model.decode_features(features)[..., ::4, ::4], pixels, 1e-3 * pixels.abs().max().item())


# ---- the text-to-image model -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_inputs_mask_logits_and_loss_are_the_reference_s(t2i, expected):
    ids = expected["tf_input_ids"].long()
    embeds, blocks = t2i.model.embed_sequences(ids)
    close(embeds, expected["tf_inputs_embeds"], 1e-4)
    mask = (ids != TINY_PAD).long()
    output = t2i(ids, attention_mask=mask, labels=expected["tf_labels"].long())
    valid = mask[:1].bool()
    close(output.logits[:1][valid], expected["tf_logits"][valid], 1e-4)
    close(output.loss, expected["tf_loss_vision"][0], 1e-4)
    columns = torch.arange(ids.shape[1])
    seen = columns[None] <= columns[:, None]
    seen |= (blocks[0][:, None] == blocks[0][None]) & (blocks[0] >= 0)
    seen &= mask[0].bool()
    assert torch.equal(seen[valid[0]], expected["tf_attend"][0][valid[0]])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
def test_drawing_is_the_reference_s_with_and_without_a_cache(t2i, expected, use_cache, passes):
    prompts = expected["prompt_ids"].long()
    masks = (prompts != TINY_PAD).long()
    output = t2i.generate(
        prompts[:2],
        attention_mask=masks[:2],
        negative_prompt_ids=prompts[2:],
        negative_prompt_attention_mask=masks[2:],
        guidance_scale=3.0,
        top_k=1,
        use_cache=use_cache,
        resampling=[{"top_k": 1}] * (passes - 1),
    )
    name = "greedy_codes" if passes == 1 else "greedy_refine_codes"
    assert torch.equal(torch.stack(output.codes), expected[name].long())
    if passes == 1:
        picture = np.asarray(to_picture(output.images[0])).astype(int)
        assert abs(picture - expected["greedy_image_uint8"][0].numpy().astype(int)).max() <= 1


def test_prompts_may_come_unpadded_and_are_one_by_one_as_in_a_batch(t2i, expected):
    prompts = expected["prompt_ids"].long()[:2]
    masks = (prompts != TINY_PAD).long()
    settings = {"guidance_scale": 2.0, "top_k": 20, "top_p": 0.9, "resampling": [{"top_k": 5, "top_p": 0.8}]}
    together = t2i.generate(prompts, attention_mask=masks, seed=[3, 4], **settings)
    for row in range(2):
        words = prompts[row][masks[row] > 0][:-3][None]
        alone = t2i.generate(words, seed=3 + row, **settings)
        assert torch.equal(alone.codes[0], together.codes[row])
        close(alone.images[0], together.images[row], 1e-5)


def test_log_probabilities_are_those_of_a_teacher_forced_pass(t2i, expected):
    """Of the codes that were kept, whatever passes chose them."""
    prompt = expected["prompt_ids"].long()[:1]
    mask = (prompt != TINY_PAD).long()
    output = t2i.generate(
        prompt, attention_mask=mask, guidance_scale=2.0, seed=5, top_k=9, resampling=[{"top_k": 4}, {"top_p": 0.5}]
    )
    ids = torch.cat([prompt, output.codes[0][None] + 65], dim=1)
    with torch.no_grad():
        logits = t2i(ids, attention_mask=torch.nn.functional.pad(mask, (0, 817), value=1)).logits
    codes = logits[0, 14:-1, 65:].log_softmax(dim=-1).gather(-1, output.codes[0][:, None])[:, 0]
    close(output.log_probs[0], codes, 1e-4)


def test_one_negative_prompt_serves_all(t2i):
    prompts = torch.tensor([[1, 5, 6], [1, 8, 9]])
    negative = torch.tensor([[1, 7]])
    settings = {"guidance_scale": 2.0, "seed": 3, "top_k": 9}
    one = t2i.generate(prompts, negative_prompt_ids=negative, **settings)
    each = t2i.generate(prompts, negative_prompt_ids=negative.expand(2, -1), **settings)
    for own, other in zip(one.codes, each.codes, strict=True):
        assert torch.equal(own, other)


def test_top_k_and_top_p_keep_what_the_reference_keeps(expected):
    scores = expected["filter_logits_in"][0]
    probabilities, codes = kept_probabilities(scores, ImageSampling(0.0, 1.0, 30, 0.6))
    found = torch.zeros_like(scores).scatter(-1, codes, probabilities / probabilities.sum(-1, keepdim=True))
    close(found, expected["filter_probs_topk30_topp06"][0], 1e-6)


def test_a_static_cache_draws_the_same(t2i, expected):
    prompt = expected["prompt_ids"].long()[:1]
    settings = {"attention_mask": (prompt != TINY_PAD).long(), "guidance_scale": 2.0, "seed": 5, "top_k": 8}
    dynamic = t2i.generate(prompt, **settings)
    static = t2i.generate(prompt, cache_implementation="static", **settings)
    assert torch.equal(dynamic.codes[0], static.codes[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.ones(1, 13, dtype=torch.long)}, "12 tokens, got 13"),
        ({"image_size": (128, 128)}, "256x256"),
        ({"resampling": [{"seed": 1}]}, "resampling"),
        ({"resampling": [{"top_k": 1}], "cache_implementation": "static"}, "dynamic"),
        ({"resampling": 2}, "resampling"),
        ({"generation_mode": "text"}, "pictures alone"),
        ({"mask": torch.ones(256, 256)}, "no pictures"),
        ({"input_ids": torch.tensor([[1, 5, 60, 61, 62], [1, 60, 61, 62, 9]])}, "all prompts of a batch"),
        ({"guidance_scale": 0.0, "negative_prompt_ids": torch.ones(1, 3, dtype=torch.long)}, "guidance"),
        ({"negative_prompt_ids": torch.ones(2, 3, dtype=torch.long)}, "2 negative prompts"),
    ],
)
def test_wrong_calls_are_refused(t2i, arguments, message):
    with pytest.raises(ValueError, match=message):
        t2i.generate(**{"input_ids": torch.ones(1, 4, dtype=torch.long), "guidance_scale": 1.0, **arguments})


def test_training_rows_must_hold_a_whole_picture(t2i, expected):
    ids = expected["tf_input_ids"].long()
    with pytest.raises(ValueError, match="Row 0 holds 800 codes"):
        t2i(ids[:, : 15 + 800])


def test_a_fine_tuned_model_keeps_the_tokenizer_that_it_draws_with(expected, tmp_path):
    model = tiny_t2i()
    model.config.codebook_fingerprint = model.vq_model.fingerprint()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    ids = expected["tf_input_ids"].long()
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=1e-3)
    model(ids, attention_mask=(ids != TINY_PAD).long(), labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    after = TokenFlowForImageGeneration.from_pretrained(tmp_path).state_dict()
    moved = {name for name, own in before.items() if not torch.equal(own, after[name])}
    assert not any(name.startswith("model.vq_model.") for name in moved)
    assert {"model.connector.linear_1.weight", "model.level_embedding.weight", "lm_head.weight"} <= moved


def test_the_published_shape_has_a_place_for_every_weight():
    config = TokenFlowConfig()
    rules, dropped = t2i_rules(config)
    with torch.device("meta"):
        model = TokenFlowForImageGeneration(config)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    own = {name: shape for name, shape in own.items() if not name.startswith("model.vq_model.")}
    source = {rule.sources[0]: own[rule.targets[0]] for rule in rules}
    check_rules(rules, dropped, {**source, "image_token_start": ()}, own)
    assert source["lm_head.weight"] == (64769, 4096) and source["model.pos_1LC"] == (817, 4096)
