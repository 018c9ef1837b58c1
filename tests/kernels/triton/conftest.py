"""The Triton kernels: in the interpreter where there is no GPU (tests/conftest.py says so), compiled where there is one."""

import os
from importlib.util import find_spec

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_pycollect_makemodule():
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'test-time-regression[triton]' (Linux)", allow_module_level=True)


@pytest.fixture
def device() -> str:
    """Where the kernels run in this process."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def interpreter() -> None:
    """Skips what only makes sense, or is only affordable, in the interpreter."""
    if not INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not 1: the kernels are compiled in this process, see test_gpu.py")


if INTERPRETED and find_spec("triton") is not None:
    from .interpreter import guard_memory, patch_once_a_launch

    patch_once_a_launch()
    guard_memory()
