"""Which checkpoint may take another's place in the box."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import small_model

from nextflow_hf import bundle as bundling
from nextflow_hf.bundle import _halves, bundle_adapter, bundle_refiner, check_better, main, scores_of
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration


def scores(drawing, questions, **more):
    def score(value):
        return {"score": value, "low": 0.0, "high": 1.0}

    return {
        "drawing": {"overall": score(drawing), "colors": score(0.1)},
        "drawing_at_other_sizes": {"48x80": {"overall": score(0.5), "colors": score(0.1)}},
        "captions": score(0.9),
        "abilities": {
            "64x64": {
                "questions": score(questions),
                "questions: count": score(0.1),
                "masked edits: change outside, levels": 0.3,
            },
            **{group: {"drawn": score(value)} for group, value in more.items()},
        },
    }


def test_every_measure_counts_once_and_kinds_do_not():
    assert scores_of(scores(0.7, 0.6)) == {
        "drawing": 0.7,
        "drawing at 48x80": 0.5,
        "captions": 0.9,
        "questions (64x64)": 0.6,
    }


@pytest.mark.parametrize(
    "after, taken",
    [
        (scores(0.72, 0.6), True),
        (scores(0.70, 0.6), False),
        (scores(0.69, 0.8), True),
        (scores(0.67, 0.9), False),
        (scores(0.69, 0.6, words=0.2), True),
    ],
)
def test_a_checkpoint_is_replaced_where_scores_rise_and_drawing_is_kept(after, taken):
    if taken:
        check_better(scores(0.70, 0.6), after)
    else:
        with pytest.raises(ValueError, match="nothing changed"):
            check_better(scores(0.70, 0.6), after)


def test_an_ability_that_is_gone_counts_as_nothing():
    with pytest.raises(ValueError, match=r"drawn \(words\) 0.500 to 0.000"):
        check_better(scores(0.70, 0.6, words=0.5), scores(0.71, 0.61))


def test_a_checkpoint_of_words_is_replaced_by_one_that_draws_more_of_them():
    def drawn(words, letters):
        return {"words": {"words drawn": {"score": words}, "words drawn: letters": {"score": letters}}}

    assert scores_of(drawn(0.6, 0.9)) == {"words drawn": 0.6, "words drawn: letters": 0.9}
    check_better(drawn(0.6, 0.9), drawn(0.7, 0.9))
    with pytest.raises(ValueError, match=r"words drawn 0.600 to 0.500"):
        check_better(drawn(0.6, 0.9), drawn(0.5, 0.95))


def test_half_precision_on_disk_loads_as_what_it_was(tmp_path):
    """Half the bytes, the same codes, and weights in float32 that differ by half precision's rounding alone."""
    model = small_model(tie_word_embeddings=True)
    model.config.codebook_fingerprint = model.vq_model.fingerprint()
    model.save_pretrained(tmp_path, state_dict=_halves(model))
    saved = load_file(tmp_path / "model.safetensors")
    assert {own.dtype for name, own in saved.items() if "codebook" not in name} == {torch.float16}
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32 and loaded.vq_model.fingerprint() == model.vq_model.fingerprint()
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    for before, after in zip(model.parameters(), loaded.parameters()):
        torch.testing.assert_close(after, before, rtol=2**-10, atol=2**-20)


def test_what_the_box_has_no_place_for_is_refused(tmp_path, monkeypatch, capsys):
    for bundle, kind in ((bundle_adapter, "adapter"), (bundle_refiner, "refiner")):
        with pytest.raises(ValueError, match=rf"the {kind} of \['mini'\], not of 'mini-words'"):
            bundle(tmp_path, "mini-words")
    for kind in ("--adapter", "--refiner"):
        monkeypatch.setattr(sys, "argv", ["bundle", str(tmp_path), "mini", "run", "--vq", "vq", kind])
        with pytest.raises(SystemExit):
            main()
        assert "not allowed with argument --vq" in capsys.readouterr().err


def test_an_adapter_that_looks_is_bundled_with_one_that_thinks(tmp_path, monkeypatch):
    box = tmp_path / "box"
    monkeypatch.setitem(bundling.ADAPTERS, "mini", str(box))
    seen = []

    def evaluated(name, adapter, **settings):
        seen.append(sorted(str(own.relative_to(adapter)) for own in Path(adapter).rglob("*.safetensors")))
        return {
            "abilities": {"64x64": {"questions, in words": {"score": 0.5, "low": 0.4, "high": 0.6}}},
            "settings": {"guesses": 6, "drafts": 8, **settings},
        }

    monkeypatch.setattr(bundling, "evaluate_in_words", evaluated)
    for name, rank, value in (("looks", 1, 0.25), ("thinks", 2, 0.1)):
        (tmp_path / name / "adapter").mkdir(parents=True)
        save_file({"lora_A": torch.tensor([value])}, tmp_path / name / "adapter" / "adapter_model.safetensors")
        (tmp_path / name / "adapter" / "adapter_config.json").write_text(json.dumps({"r": rank}))
        (tmp_path / name / "adapter" / "generation_config.json").write_text(json.dumps({"enable_thinking": rank == 2}))
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": rank}]}))
    arguments = ["bundle", str(tmp_path), "mini", "looks", "--thinks", "thinks"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--adapter", "--threads", str(torch.get_num_threads())])
    main()
    assert seen == [["adapter_model.safetensors", "think/adapter_model.safetensors"]]
    for folder, rank, value in ((box, 1, 0.25), (box / "think", 2, 0.1)):
        half = load_file(folder / "adapter_model.safetensors")["lora_A"]
        assert half.dtype == torch.float16 and half.item() == pytest.approx(value, rel=1e-3)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config == {"r": rank, "base_model_name_or_path": "nextflow-mini"}
        assert json.loads((folder / "generation_config.json").read_text())["enable_thinking"] == (rank == 2)
    assert json.loads((box / "training_log.json").read_text()) == {"looks": [{"step": 1}], "thinks": [{"step": 2}]}
    assert "Two adapters (LoRA of rank 1, and, in `think`, of rank 2)" in (box / "README.md").read_text()
    # No better than what is there by now.
    with pytest.raises(ValueError, match="nothing changed"):
        main()
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        main()


def test_an_adapter_beyond_half_precision_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 1}))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    save_file({"lora_A": torch.tensor([1e6])}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lora_A holds numbers that half precision does not"):
        bundle_adapter(tmp_path, "mini")
    assert not (tmp_path / "candidate").exists()
