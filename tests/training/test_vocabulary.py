import pytest
import torch
from huggingface_hub import constants
from small_models import small_config

from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.modeling.modeling_nextflow_vq import NextFlowVQModel
from nextflow_hf.processing.tokenization_nextflow import train_tokenizer
from nextflow_hf.training.recipe import Recipe
from nextflow_hf.training.train_decoder import _decoder_of
from nextflow_hf.training.vocabulary import with_vocabulary


def decoder(tokenizer, code_start_id=290):
    text = {**small_config().text_config.to_dict(), "vocab_size": code_start_id + 32}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    torch.manual_seed(0)
    return NextFlowForConditionalGeneration(small_config(text_config=text, code_start_id=code_start_id)).eval()


@pytest.fixture
def larger():
    """A codebook of 48, the first 32 of which are the old codes in reverse."""
    config = small_config().vq_config
    config.codebook_size = 48
    return NextFlowVQModel(config).eval()


def test_tokens_and_codes_keep_their_embeddings(tokenizer, larger):
    model = decoder(tokenizer)
    with torch.no_grad():
        for part in ("semantic", "pixel"):
            own, old = getattr(larger.codebook, part).weight, getattr(model.vq_model.codebook, part).weight
            own[:32] = old.flip(0)
    after = train_tokenizer(["user\ndraw circle 1 which", "assistant\ncircle 2"] * 50, 300)
    new = with_vocabulary(model, tokenizer, after, larger, 310)
    old_rows, rows = model.get_input_embeddings().weight, new.get_input_embeddings().weight
    assert rows.shape[0] == new.config.text_config.vocab_size == 310 + 48
    for token, index in after.get_vocab().items():
        if token in tokenizer.get_vocab():
            assert torch.equal(rows[index], old_rows[tokenizer.get_vocab()[token]])
    parts = tokenizer(" circle", add_special_tokens=False).input_ids
    (index,) = after(" circle", add_special_tokens=False).input_ids
    torch.testing.assert_close(rows[index], old_rows[parts].mean(dim=0))
    assert torch.equal(rows[310 : 310 + 32], old_rows[290:].flip(0))
    assert new.vq_model.fingerprint() == larger.fingerprint()
    # Everything else is the same, so text of known tokens gives the same states.
    ids = torch.tensor([[1, 7, 8, 9]])
    torch.testing.assert_close(new.model(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_refuses_vocabularies_that_do_not_fit(tokenizer, larger):
    model = decoder(tokenizer)
    with pytest.raises(ValueError, match="codes would begin at 100"):
        with_vocabulary(model, tokenizer, tokenizer, larger, 100)
    config = small_config().vq_config
    config.pixel_dim = 6
    with pytest.raises(ValueError, match="Codes of width 12"):
        with_vocabulary(model, tokenizer, tokenizer, NextFlowVQModel(config), 290)


def going_on(start, folder, model, before, after):
    """Save a decoder with its tokenizer, and the recipe that goes on from it, known as `start`, with another one."""
    model.save_pretrained(folder)
    before.save_pretrained(folder)
    after.save_pretrained(folder.parent / "after")
    return Recipe("decoder", "run", init_from={"decoder": str(start), "tokenizer": str(folder.parent / "after")})


def test_as_many_other_codes_are_other_codes(tokenizer, tmp_path):
    model = decoder(tokenizer)
    recipe = going_on(tmp_path / "start", tmp_path / "start", model, tokenizer, tokenizer)
    other = decoder(tokenizer).vq_model
    same = _decoder_of(recipe, other)
    assert torch.equal(same.lm_head.weight, model.lm_head.weight)
    with torch.no_grad():
        for part in (other.codebook.semantic, other.codebook.pixel):
            part.weight.copy_(part.weight.flip(0))
    new = _decoder_of(recipe, other)
    before, after = (own.get_input_embeddings().weight for own in (model, new))
    known = slice(len(tokenizer))
    assert torch.equal(after[290:], before[290:].flip(0)) and torch.equal(after[known], before[known])
    assert torch.equal(new.lm_head.weight[290:], model.lm_head.weight[290:].flip(0))
    assert new.config.codebook_fingerprint == other.fingerprint()


def test_a_decoder_of_the_hub_brings_its_own_tokenizer(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--own--decoder"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    after = train_tokenizer(["user\ndraw circle 1 which", "assistant\ncircle 2"] * 50, 300)
    model = decoder(tokenizer)
    recipe = going_on("own/decoder", repository / "snapshots" / ("0" * 40), model, tokenizer, after)
    rows = _decoder_of(recipe, decoder(tokenizer).vq_model).get_input_embeddings().weight
    for token, index in after.get_vocab().items():
        if token in tokenizer.get_vocab():
            assert torch.equal(rows[index], model.get_input_embeddings().weight[tokenizer.get_vocab()[token]])
