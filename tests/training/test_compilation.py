"""Layers that are compiled one by one: the same losses and gradients, and nothing compiled anew for every batch."""

import copy
import os
import pickle
from functools import partial

import pytest
import torch
from small_models import small_model

from nextflow_hf.modeling.block_attention import block_varlen_attention
from nextflow_hf.training import stage_trainer
from nextflow_hf.training.compilation import compile_layers, take_compilation
from nextflow_hf.training.packing import Bin, collate_packed
from nextflow_hf.training.recipe import Recipe


def row(config, words: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A document with a picture, and one of text for each number of words."""
    grids = config.schedule.grids_for_size(32, 32)
    codes = [index % 32 for index in range(sum(height * width for height, width in grids))]
    ids = [7, config.boi_token_id, *[config.image_token_id] * (len(codes) - 1), config.eoi_token_id, 8, 9]
    picture = {"input_ids": ids, "labels": ids, "codes": [codes], "image_labels": [codes], "grids": [grids]}
    nothing = {"codes": [], "image_labels": [], "grids": []}
    texts = [{"input_ids": [*range(6, 6 + own)], "labels": [*range(6, 6 + own)], **nothing} for own in words]
    return collate_packed([Bin((picture, *texts), 0.0)])


class Counting:
    """A backend that runs what is compiled by torch's own kernels, without a C++ compiler, and notes each graph."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointing", "reentrant"])
def test_compiled_layers_give_the_same_losses_and_gradients(checkpointing, autocast):
    torch.compiler.reset()
    backend, results = Counting(), []
    for compiled in (False, True):
        model = small_model().train()
        model.vq_model.requires_grad_(False)
        model.model.language_model.set_attn_implementation("block_varlen")
        if compiled:
            compile_layers(model, backend=backend)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        results.append([])
        for number, words in enumerate([(5, 9), (6, 20), (31,), (4, 4, 4)]):
            # The second length makes the shapes dynamic; from then on nothing may be compiled.
            with torch.compiler.set_stance("fail_on_recompile" if compiled and number > 1 else "default"):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    output = model(**row(model.config, words), use_cache=False)
                output.loss.backward()
            results[-1].append(output.loss.detach())
        results[-1] += [own.grad for own in model.parameters() if own.grad is not None]
    assert len(results[0]) == len(results[1])
    for eager, own in zip(*results):
        torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-5)
    # What stands before a layer's attention, its output's product, what stands behind it; the loss: each of one length
    # and of any.
    assert len(backend.graphs) >= 2 * 4
    calls = {node.target for graph in backend.graphs for node in graph.graph.nodes}
    assert {torch.rsqrt, torch.nn.functional.silu} <= calls and "log_softmax" in calls


def test_a_frozen_tokenizer_is_not_compiled():
    model = small_model()
    model.vq_model.requires_grad_(False)
    eager = {name: type(own) for name, own in model.named_modules()}
    compile_layers(model)
    compiled = {name for name, own in model.named_modules() if type(own) is not eager[name]}
    assert compiled == {"model.language_model.layers.0", "model.language_model.layers.1"}
    assert model.lm_head.loss_compilation == {}


def test_a_compiled_layer_is_its_class_still_and_copies_are_not_compiled():
    model = small_model()
    layer = model.model.language_model.layers[0]
    own = type(layer)
    compile_layers(model, backend="eager")
    assert isinstance(layer, own) and type(layer) is not own and type(layer).__name__ == own.__name__
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is own and torch.equal(copied.mlp.up_proj.weight, layer.mlp.up_proj.weight)
    hidden_states = model(torch.tensor([[7, 8, 9]]), output_hidden_states=True).hidden_states
    assert len(hidden_states) == 1 + len(model.model.language_model.layers)


def test_decoding_with_a_cache_is_compiled_without_a_break():
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 9, 8)
    attend = partial(block_varlen_attention, module)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, key, key, None)[0], attend(query, key, key, None)[0])


def test_a_stage_compiles_a_decoder_by_layers_and_leaves_other_models_to_the_trainer(tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def stop(**kwargs):
        raise Reached(kwargs)

    monkeypatch.setattr(stage_trainer, "StageTrainer", stop)
    # `TrainingArguments` write there.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    trainer = {"torch_compile_backend": "eager", "use_cpu": True}
    for stage, model in (("vq", small_model().vq_model), ("decoder", small_model())):
        recipe = Recipe(stage=stage, output_dir=str(tmp_path / stage), trainer=trainer)
        with pytest.raises(Reached) as reached:
            stage_trainer.run_stage(recipe, model, [], None, None)
        (given,) = reached.value.args
        assert given["args"].torch_compile == (stage == "vq")
    assert model.lm_head.loss_compilation == {"backend": "eager"}
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ


def test_what_a_recipe_says_of_compilation_is_kept_from_the_trainer():
    arguments = {"max_steps": 3, "torch_compile": True, "torch_compile_mode": "max-autotune-no-cudagraphs"}
    assert take_compilation(arguments) == {"mode": "max-autotune-no-cudagraphs"}
    assert arguments == {"max_steps": 3}
    assert take_compilation({"torch_compile": True}) == {}
    assert take_compilation({"torch_compile_backend": "inductor"}) == {"backend": "inductor"}
    assert take_compilation({"torch_compile": False}) is None and take_compilation({}) is None
