import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are slower on several threads, and much slower beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
