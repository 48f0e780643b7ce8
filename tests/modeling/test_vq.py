import pytest
import torch
import torch.nn.functional as F
from small_models import small_config, small_model

from nextflow_hf.modeling import modeling_nextflow_vq
from nextflow_hf.modeling.modeling_nextflow_vq import DualCodebook, NextFlowVQModel


@pytest.fixture
def vq_model():
    torch.manual_seed(0)
    return NextFlowVQModel(small_config().vq_config).eval()


@pytest.fixture
def pixels():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_nearest_code_minimises_the_weighted_sum_of_both_distances(vq_model):
    codebook = vq_model.codebook
    codebook.pixel_distance_weight = 0.3
    features = codebook.normalize(torch.randn(50, 10))
    table = codebook.table()
    semantic = torch.cdist(features[:, :6], table[:, :6]) ** 2
    pixel = torch.cdist(features[:, 6:], table[:, 6:]) ** 2
    expected = semantic + 0.3 * pixel
    distances, codes = codebook.nearest(features, table)
    assert torch.equal(codes[:, 0], expected.argmin(dim=1))
    torch.testing.assert_close(distances[:, 0], expected.min(dim=1).values, atol=1e-5, rtol=1e-5)


def test_search_in_chunks_equals_search_at_once(vq_model, pixels, monkeypatch):
    whole = vq_model.encode(pixels).codes
    monkeypatch.setattr(modeling_nextflow_vq, "SEARCH_CHUNK_BYTES", 4 * 32 * 5)
    assert torch.equal(vq_model.encode(pixels).codes, whole)


def test_a_search_over_the_7b_codebook_stays_under_a_gigabyte():
    rows = modeling_nextflow_vq.SEARCH_CHUNK_BYTES // (4 * 32768)
    assert rows > 0 and rows * 32768 * 4 < 2**30


@pytest.mark.parametrize(("before", "after"), [((1, 1), (4, 6)), ((2, 5), (6, 7)), ((8, 8), (3, 8))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_are_resized_as_torch_does(before, after, dtype):
    maps = torch.randn(2, 3, *before, dtype=dtype)
    expected = F.interpolate(maps, size=after, mode="bicubic", align_corners=False)
    torch.testing.assert_close(modeling_nextflow_vq.upsample(maps, after), expected)


def test_residual_quantization_by_hand(vq_model, pixels):
    """Area down, nearest code, bicubic up, subtract: step by step (NextFlow 2.1, TokenFlow)."""
    latents, _ = vq_model.latents(pixels)
    encoding = vq_model.encode(pixels)
    residual, codes = latents, []
    for height, width in encoding.grids:
        z = F.adaptive_avg_pool2d(residual, (height, width))
        z = torch.cat([F.normalize(z[:, :6], dim=1), F.normalize(z[:, 6:], dim=1)], dim=1)
        rows = z.permute(0, 2, 3, 1).reshape(-1, 10)
        index = (torch.cdist(rows, vq_model.codebook.table()) ** 2).argmin(dim=1)
        codes.append(index.view(3, -1))
        chosen = vq_model.codebook.table()[index].view(3, height, width, 10).permute(0, 3, 1, 2)
        up = chosen if (height, width) == (4, 4) else F.interpolate(chosen, (4, 4), mode="bicubic")
        residual = residual - up
    assert torch.equal(encoding.codes, torch.cat(codes, dim=1))


def test_sum_of_codes_is_what_was_encoded(vq_model, pixels):
    encoding = vq_model.encode(pixels)
    torch.testing.assert_close(vq_model.sum_features(encoding.codes, encoding.grids), encoding.features)


def test_a_picture_is_encoded_alike_alone_and_in_a_batch(vq_model, pixels):
    batch = vq_model.encode(pixels).codes
    for row in range(3):
        assert torch.equal(vq_model.encode(pixels[row : row + 1]).codes[0], batch[row])


def test_decodes_every_prefix_at_full_size(vq_model, pixels):
    encoding = vq_model.encode(pixels)
    pictures = []
    for scales in range(1, 5):
        count = sum(h * w for h, w in encoding.grids[:scales])
        pictures.append(vq_model.decode(encoding.codes[:, :count], encoding.grids))
        assert pictures[-1].shape == pixels.shape and pictures[-1].abs().max() <= 1
    assert not torch.equal(pictures[0], pictures[-1])


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (16, 48), (48, 16)])
def test_any_aspect_ratio(vq_model, size):
    pixels = torch.rand(2, 3, *size) * 2 - 1
    encoding = vq_model.encode(pixels)
    assert encoding.grids[-1] == (size[0] // 8, size[1] // 8)
    assert vq_model.decode(encoding.codes, encoding.grids).shape == pixels.shape


def test_self_correction_requantizes_what_the_sampled_codes_leave(vq_model, pixels):
    generator = torch.Generator().manual_seed(3)
    encoding = vq_model.encode(pixels, top_k=5, corruption=0.6, generator=generator)
    differs = (encoding.codes != encoding.input_codes).float().mean()
    assert 0.3 < differs < 0.6
    # The target of each scale is the code nearest to the residual that the *sampled* codes left.
    torch.testing.assert_close(vq_model.sum_features(encoding.input_codes, encoding.grids), encoding.features)
    latents, _ = vq_model.latents(pixels)
    coarse = sum(
        modeling_nextflow_vq.upsample(vq_model.codebook.lookup(scale).permute(0, 3, 1, 2), (4, 4))
        for scale in vq_model.split_codes(encoding.input_codes, encoding.grids)[:-1]
    )
    rows = vq_model.codebook.normalize((latents - coarse).permute(0, 2, 3, 1).reshape(-1, 10))
    expected = vq_model.codebook.nearest(rows, vq_model.codebook.table())[1].view(3, -1)
    assert torch.equal(encoding.codes[:, -16:], expected)


def test_self_correction_is_reproducible_and_off_by_default(vq_model, pixels):
    first, second = (
        vq_model.encode(pixels, top_k=5, generator=torch.Generator().manual_seed(3)).input_codes for _ in range(2)
    )
    assert torch.equal(first, second)
    plain = vq_model.encode(pixels)
    assert torch.equal(plain.codes, plain.input_codes)


def test_saved_and_loaded_is_the_same_to_the_bit(vq_model, pixels, tmp_path):
    vq_model.save_pretrained(tmp_path)
    loaded = NextFlowVQModel.from_pretrained(tmp_path).eval()
    before, after = vq_model.encode(pixels), loaded.encode(pixels)
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(vq_model.decode(before.codes, before.grids), loaded.decode(after.codes, after.grids))
    assert loaded.fingerprint() == vq_model.fingerprint()


def test_quantizes_in_float32_whatever_the_dtype(vq_model, pixels, tmp_path):
    vq_model.save_pretrained(tmp_path)
    loaded = NextFlowVQModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert loaded.codebook.semantic.weight.dtype == torch.float32
    assert loaded.latents(pixels)[0].dtype == torch.float32
    assert loaded.fingerprint() == vq_model.fingerprint() == vq_model.to(torch.bfloat16).fingerprint()


def test_training_moves_every_part_and_lowers_the_loss(vq_model, pixels):
    vq_model.train()
    vq_model.start_codebook([pixels], torch.Generator().manual_seed(0))
    vq_model.config.scale_dropout = 0.0
    optimizer = torch.optim.Adam(vq_model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        output = vq_model(pixels)
        optimizer.zero_grad()
        output.loss.backward()
        losses.append(output.loss.item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    for name in (
        "semantic_proj.0",
        "pixel_encoder.conv_in",
        "pixel_decoder.conv_in",
        "codebook.semantic",
        "codebook.pixel",
    ):
        assert vq_model.get_submodule(name).weight.grad.abs().sum() > 0, name


def test_an_extended_codebook_keeps_what_was_there(vq_model, pixels):
    before = vq_model.codebook
    known = {name: getattr(before, name).weight.clone() for name in ("semantic", "pixel")}
    vq_model.config.codebook_size = before.size + 8
    vq_model.codebook = DualCodebook(vq_model.config)
    vq_model.codebook.freeze_rows(before)
    vq_model.extend_codebook([pixels], torch.Generator().manual_seed(0))
    # Where the new codes begin some output lay, and nearer to it than any code that was there.
    started = vq_model.codebook.pixel.weight[before.size :].clone()
    vq_model.train()
    vq_model.config.dead_code_threshold = 10.0
    optimizer = torch.optim.Adam(vq_model.parameters(), 3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        vq_model(pixels).loss.backward()
        optimizer.step()
    for name, weight in known.items():
        assert torch.equal(getattr(vq_model.codebook, name).weight[: before.size], weight)
    assert not torch.allclose(vq_model.codebook.pixel.weight[before.size :], started)
    with pytest.raises(ValueError, match="cannot begin with"):
        before.freeze_rows(vq_model.codebook)


def test_new_codes_go_where_the_old_ones_fit_worst(vq_model, pixels):
    before = vq_model.codebook
    known, strange = pixels[:1], -pixels[:1]
    # The old codes are those that show one picture.
    vq_model.start_codebook([known], torch.Generator().manual_seed(0))
    vq_model.config.codebook_size = before.size + 32
    vq_model.codebook = DualCodebook(vq_model.config)
    vq_model.codebook.freeze_rows(before)
    vq_model.extend_codebook([known, strange], torch.Generator().manual_seed(0))
    share_known, share_strange = (
        (vq_model.encode(own).codes >= before.size).float().mean().item() for own in (known, strange)
    )
    assert share_strange > share_known


def test_scale_dropout_keeps_the_first_scale(vq_model, pixels):
    vq_model.train()
    vq_model.config.scale_dropout = 1.0
    assert vq_model(pixels).codes.shape == (3, 1)
    assert vq_model.eval()(pixels).codes.shape == (3, 30)


def test_dead_codes_are_moved_onto_encoder_outputs(vq_model, pixels):
    vq_model.train()
    vq_model.config.dead_code_threshold = 0.5
    vq_model.codebook.usage.zero_()
    before = vq_model.codebook.table().clone()
    vq_model(pixels)
    assert not torch.equal(before, vq_model.codebook.table())
    assert (vq_model.codebook.usage >= 0.5).sum() >= 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(1, 3, 30, 32)), "multiples of 8"),
        (lambda m: m.encode(torch.zeros(1, 3, 0, 8)), "multiples of 8"),
        (lambda m: m.encode(torch.zeros(1, 4, 32, 32)), "Expected float pixels"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "Expected float pixels"),
        (lambda m: m.encode(torch.full((1, 3, 32, 32), float("nan"))), "NaN"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), top_k=0), "top_k"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), top_k=33), "top_k"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), top_k=2, corruption=1.5), "corruption"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), grids=[(1, 1), (2, 2)]), "last scale"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), grids=[(1, 1), (3, 2), (3, 3), (4, 4)]), "no schedule"),
        (lambda m: m.decode(torch.full((1, 30), 32), ((1, 1), (2, 2), (3, 3), (4, 4))), "Codes must lie in"),
        (lambda m: m.decode(torch.full((1, 30), -1), ((1, 1), (2, 2), (3, 3), (4, 4))), "Codes must lie in"),
        (lambda m: m.decode(torch.zeros(1, 29, dtype=torch.long), ((1, 1), (2, 2), (3, 3), (4, 4))), "whole scale"),
        (lambda m: m.decode(torch.zeros(1, 30), ((1, 1), (2, 2), (3, 3), (4, 4))), "integer codes"),
    ],
)
def test_refuses_what_is_no_picture(vq_model, call, message):
    with pytest.raises(ValueError, match=message):
        call(vq_model)


def test_codes_are_found_in_full_precision_under_autocast(vq_model):
    codebook = vq_model.codebook
    semantic, pixel = codebook.table()[0].split(
        [codebook.semantic_dim, codebook.table().shape[1] - codebook.semantic_dim]
    )
    # The second code lies next to the first, nearer than bfloat16 tells.
    near = F.normalize(semantic + 2e-3 * semantic.roll(1), dim=-1)
    table = torch.stack([torch.cat([semantic, pixel]), torch.cat([near, pixel])])
    with torch.autocast("cpu", torch.bfloat16):
        distances, codes = codebook.nearest(table, table)
    assert codes[:, 0].tolist() == [0, 1] and distances.dtype == torch.float32


def test_what_export_traces_leaves_no_trace(vq_model):
    """A cache of tensors would keep the tracer's."""

    class Resize(torch.nn.Module):
        def forward(self, maps):
            return modeling_nextflow_vq.upsample(maps, (7, 11))

    maps = torch.randn(1, 2, 3, 5)
    exported = torch.export.export(Resize(), (maps,)).module()
    torch.testing.assert_close(exported(maps), modeling_nextflow_vq.upsample(maps, (7, 11)))


@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"])
def test_a_whole_nextflow_holds_its_tokenizer(tmp_path, pixels, max_shard_size):
    model = small_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded, report = NextFlowVQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded.config) is type(model.vq_model.config)
    assert loaded.fingerprint() == model.vq_model.fingerprint()
    assert torch.equal(loaded.eval().encode(pixels).codes, model.vq_model.eval().encode(pixels).codes)
    # Saved anew it is a tokenizer alone, under its own names.
    loaded.save_pretrained(tmp_path / "vq")
    again, report = NextFlowVQModel.from_pretrained(tmp_path / "vq", output_loading_info=True)
    assert not any(report.values())
    assert again.fingerprint() == loaded.fingerprint()


def test_a_tokenizer_is_no_nextflow_and_a_language_model_no_tokenizer(tmp_path):
    model = small_model()
    model.vq_model.save_pretrained(tmp_path / "vq")
    with pytest.raises(ValueError, match="'nextflow_vq', and NextFlowForConditionalGeneration"):
        type(model).from_pretrained(tmp_path / "vq")
    model.model.language_model.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="'qwen2_5_vl_text', and NextFlowVQModel"):
        NextFlowVQModel.from_pretrained(tmp_path / "text")
