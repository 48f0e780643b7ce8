"""Every common test that we skip, with its reason. `python tests/common_suite/skips.py` prints the table.

Keys are (test class or None for all, test). Tests that the suite itself skips for an absent GPU, kernel or modality do
not stand here.
"""

SKIPS: dict[tuple[str | None, str], str] = {
    ("NextFlowImageProcessingTest", "test_call_numpy_4_channels"): "four channels are RGBA, which becomes RGB on white",
    (
        "NextFlowImageProcessingTest",
        "test_new_models_require_torchvision_backend",
    ): "no torchvision build fits the CPU torch of CI; NextFlowImageProcessor is that backend",
    ("NextFlowModelTest", "test_resize_tokens_embeddings"): "takes rows away, and the last rows are image codes",
    ("NextFlowModelTest", "test_resize_embeddings_untied"): "takes rows away, and the last rows are image codes",
    (
        "NextFlowProcessorTest",
        "test_if_input_has_mismatching_tokens_and_mm_data",
    ): "asks for the words of an error; ours says it in others",
    ("NextFlowVQModelTest", "test_model_get_set_embeddings"): "an image tokenizer has no token embeddings",
    ("NextFlowVQModelTest", "test_hidden_states_output"): "the tokenizer returns codes, losses and a reconstruction",
    ("NextFlowVQModelTest", "test_retain_grad_hidden_states_attentions"): "the tokenizer returns no hidden states",
}

if __name__ == "__main__":
    for (owner, test), reason in sorted(SKIPS.items(), key=str):
        print(f"{owner or '(all)'}  {test}: {reason}")
