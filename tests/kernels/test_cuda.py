"""The torch paths on a GPU: every family in float64, float32, fp16 and bf16 against the definition on the CPU."""

import pytest
import torch

import ttr
from ttr import testing

from .cuda_graph import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the same rows run on the CPU in test_conformance.py")

ROWS = [
    "gla",
    "gated_deltanet",
    "kda",
    "rwkv7",
    "gated_deltaproduct",
    "momentum_deltanet",
    "mlstm",
    "mesanet",
    "ttt_mlp",
    "titans",
    "softmax_window",
]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cuda(name, dtype):
    case = testing.random_inputs(ttr.spec(name), T=70, dk=16, dv=16, Hv=4, H=2 if name != "softmax_window" else 4, correlation=0.2).to(
        dtype
    )
    exact = testing.evaluate(case.to(torch.float64), "definition")
    own = testing.errors(testing.evaluate(case, "definition"), exact)
    path = ttr.select_path(case.spec)[0]
    got = testing.evaluate(case.to("cuda"), path)  # the kernels have a tolerance of their own: test_gpu.py
    assert got["o"].is_cuda and got["o"].dtype == dtype
    worst = max(own.values())
    for what, error in testing.errors({n: t.cpu() for n, t in got.items()}, exact).items():
        # the loop's own error in this dtype, four times for the other order of summation; float64 as on the CPU
        allowed = 1e-9 if dtype == torch.float64 else 4 * max(own[what], 0.25 * worst) + torch.finfo(dtype).eps
        if path == "dual" and dtype == torch.bfloat16:  # operands of large products are in bf16, which the loop's are not
            allowed = max(allowed, 2**-4)
        assert error <= allowed, f"{name} {dtype}: {what} is off by {error:.2e}, allowed {allowed:.2e}"


def test_decoding_under_a_cuda_graph_needs_no_host():
    """One token through a mixer leaves the device alone: capture succeeds and replays with new inputs."""
    mixer = ttr.Mixer(64, "gated_deltanet", head_dim=16).cuda().eval()
    x = torch.randn(2, 64, device="cuda")
    with torch.no_grad():
        state = mixer.prefill(torch.randn(2, 9, 64, device="cuda"))[1]
        graph, (y, _) = captured(lambda: mixer.step(x, state))
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, mixer.step(x, state)[0])
