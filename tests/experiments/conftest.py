import pytest


@pytest.fixture
def tiny():
    """A configuration that trains in a second."""
    return {
        "task": {"kind": "overwrite", "vocab_size": 32, "seq_len": 16, "pairs": 2, "updates": 2, "test_examples": 32},
        "model": {"d_model": 16, "layer": {"head_dim": 8, "expand_k": 0.5}},
        "train": {"steps": 12, "batch_size": 8},
        "mixers": {
            "delta": {"regressor": "linear", "optimizer": "delta"},
            "linear": {"regressor": "linear", "optimizer": "sgd"},
        },
    }
