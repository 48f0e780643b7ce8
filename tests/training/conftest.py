import pytest
from small_models import small_config

from nextflow_hf.processing.tokenization_nextflow import train_tokenizer
from nextflow_hf.training.sequences import SequenceBuilder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user\ndraw dot 1 which", "assistant\ndot 2"] * 50, 290)


@pytest.fixture(scope="module")
def builder_of(tokenizer):
    """Builders for a small configuration that differs in what is named."""
    text = {
        **small_config().text_config.to_dict(),
        "vocab_size": 322,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    return lambda **changes: SequenceBuilder(tokenizer, small_config(text_config=text, code_start_id=290, **changes))


@pytest.fixture(scope="module")
def builder(builder_of):
    return builder_of()
