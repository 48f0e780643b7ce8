"""Layers that are compiled one by one: the same losses and gradients, and nothing compiled anew for every batch."""

import pytest
import torch
from small_models import small_model

from nextflow_hf.modeling import chunked_cross_entropy as module
from nextflow_hf.training.compilation import compile_layers, take_compilation
from nextflow_hf.training.packing import Bin, collate_packed


def row(config, words: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A document with a picture, and one of text for each number of words."""
    grids = config.schedule.grids_for_size(32, 32)
    codes = [index % 32 for index in range(sum(height * width for height, width in grids))]
    ids = [7, config.boi_token_id, *[config.image_token_id] * (len(codes) - 1), config.eoi_token_id, 8, 9]
    picture = {"input_ids": ids, "labels": ids, "codes": [codes], "image_labels": [codes], "grids": [grids]}
    nothing = {"codes": [], "image_labels": [], "grids": []}
    texts = [{"input_ids": [*range(6, 6 + own)], "labels": [*range(6, 6 + own)], **nothing} for own in words]
    return collate_packed([Bin((picture, *texts), 0.0)])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_compiled_layers_give_the_same_losses_and_gradients(monkeypatch, checkpointing):
    # Without a C++ compiler: what is compiled is run by torch's own kernels.
    backend = {"backend": "aot_eager"}
    monkeypatch.setattr(
        module, "_compiled_to_probabilities", lambda: torch.compile(module._to_probabilities, **backend)
    )
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        model = small_model().train()
        model.model.language_model.set_attn_implementation("block_varlen")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            compile_layers(model, **backend)
        results.append([])
        for number, words in enumerate([(5, 9), (6, 20), (31,), (4, 4, 4)]):
            # The second length makes the shapes dynamic; from then on nothing may be compiled.
            with torch.compiler.set_stance("fail_on_recompile" if compiled and number > 1 else "default"):
                output = model(**row(model.config, words), use_cache=False)
                output.loss.backward()
            results[-1].append(output.loss.detach())
        results[-1] += [own.grad for own in model.parameters() if own.grad is not None]
    assert len(results[0]) == len(results[1])
    for eager, own in zip(*results):
        torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-5)


def test_a_frozen_tokenizer_is_not_compiled():
    model = small_model()
    model.vq_model.requires_grad_(False)
    compile_layers(model)
    compiled = {name.split(".")[0] for name, own in model.named_modules() if own._compiled_call_impl is not None}
    assert compiled == {"model", "lm_head"}
    assert all(own._compiled_call_impl is None for own in model.vq_model.modules())


def test_what_a_recipe_says_of_compilation_is_kept_from_the_trainer():
    arguments = {"max_steps": 3, "torch_compile": True, "torch_compile_mode": "max-autotune-no-cudagraphs"}
    assert take_compilation(arguments) == {"mode": "max-autotune-no-cudagraphs"}
    assert arguments == {"max_steps": 3}
    assert take_compilation({"torch_compile": True}) == {}
    assert take_compilation({"torch_compile_backend": "inductor"}) == {"backend": "inductor"}
    assert take_compilation({"torch_compile": False}) is None and take_compilation({}) is None
