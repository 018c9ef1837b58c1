"""`ttr.decode` on a GPU: dtypes, CUDA graphs and repeatability of the compiled step."""

import pytest
import torch

import ttr
from ttr import testing
from ttr.kernels import decode as module
from ttr.state import flatten

from ..cuda_graph import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: test_decode.py runs the step in the interpreter")

GATED = {"optimizer": "delta", "gate": "scalar"}


def tokens(spec, T, dtype=torch.float32, **sizes):
    """Arguments of T single tokens on the GPU, and an initial state."""
    case = testing.random_inputs(spec, T=T, **sizes)
    given = [{n: (x if n == "log_decay" and x.ndim == 1 else x[:, t]).to("cuda", dtype) for n, x in case.tensors.items()} for t in range(T)]
    params = {n: p.cuda().float() for n, p in case.params.items()}
    first = {n: x.to("cuda", torch.float32) for n, x in case.tokens(0, 0).tensors.items()}
    initial = case.initial_state
    initial = initial.to("cuda", torch.float32) if isinstance(initial, torch.Tensor) else initial
    state = ttr.regress(**first, spec=spec, params=params, initial_state=initial)[1]
    return case, given, params, state._map(lambda x: x.clone(memory_format=torch.contiguous_format))


class TestOnAGPU:
    @pytest.fixture(autouse=True)
    def no_grad(self):
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("B, Hv, dk, dv", [(1, 32, 128, 128), (8, 32, 128, 128), (2, 4, 256, 256), (3, 4, 24, 33), (64, 16, 64, 64)])
    @pytest.mark.parametrize("optimizer", ["sgd", "delta"])
    def test_every_dtype(self, dtype, B, Hv, dk, dv, optimizer):
        """No further from float64 than rounding q, k, v and o to this dtype explains."""
        spec = ttr.spec({"optimizer": {"kind": optimizer, "step": "sigmoid"}, "gate": "scalar"})
        case, given, _, state = tokens(spec, 4, dtype, B=B, H=Hv // 2, Hv=Hv, dk=dk, dv=dv)
        rounded = {n: x.to(dtype).double().cuda() for n, x in case.tensors.items()}  # the same inputs, exactly
        start = case.initial_state.float().double().cuda()
        exact, last = ttr.regress(**rounded, spec=spec, initial_state=start)
        assert module.step_of(spec).fused and module.step_of(spec).plain
        o = torch.stack([ttr.decode(**token, spec=spec, state=state) for token in given], 1)
        assert o.dtype == dtype
        own = (exact.to(dtype).double() - exact).norm() / exact.norm()
        assert (o.double() - exact).norm() / exact.norm() <= 1.5 * own + 1e-5
        W = last.weights["W"]
        assert (state.weights["W"].double() - W).norm() / W.norm() <= 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("B, Hv, dk, dv", [(1, 32, 128, 128), (8, 32, 128, 128), (2, 4, 256, 256), (3, 4, 24, 33), (64, 16, 64, 64)])
    @pytest.mark.parametrize("name", ["gla", "kda", "rwkv7", "gated_deltaproduct", "longhorn"])
    def test_every_dtype_of_events(self, dtype, B, Hv, dk, dv, name):
        """The inputs as the dtype has them, the signals too, which the kernel reads in float32."""
        spec = ttr.spec(name)
        case, given, _, state = tokens(spec, 4, dtype, B=B, H=Hv // 2, Hv=Hv, dk=dk, dv=dv)
        rounded = {n: x.to(dtype).double().cuda() for n, x in case.tensors.items()}
        exact, last = ttr.regress(**rounded, spec=spec, initial_state=case.initial_state.float().double().cuda(), path="recurrent")
        assert module.step_of(spec).fused and not module.step_of(spec).plain
        o = torch.stack([ttr.decode(**token, spec=spec, state=state) for token in given], 1)
        own = (exact.to(dtype).double() - exact).norm() / exact.norm()
        assert (o.double() - exact).norm() / exact.norm() <= 1.5 * own + 1e-5
        W = last.weights["W"]
        assert (state.weights["W"].double() - W).norm() / W.norm() <= 1e-5

    @pytest.mark.parametrize(
        "spec", [GATED, "kda", "rwkv7", "gated_deltaproduct", "longhorn", {"optimizer": "delta", "gate": "fixed"}, "momentum_deltanet", "gla", "mlstm", {"optimizer": "momentum", "gate": "fixed"}],
        ids=str,
    )  # fmt: skip
    def test_three_steps_in_a_graph(self, spec):
        """Captured once and replayed, the state moves on exactly as it does eagerly."""
        spec = ttr.spec(spec)
        _, given, params, state = tokens(spec, 3, B=2, H=2, Hv=4, dk=32, dv=32)
        eager = state.clone()
        held = {n: x.clone() for n, x in given[0].items()}
        warm = state.clone()
        graph, o = captured(
            lambda: ttr.decode(**held, spec=spec, state=state, params=params),
            warm=lambda: ttr.decode(**held, spec=spec, state=warm, params=params),
        )
        for token in given:
            for name, x in token.items():
                held[name].copy_(x)
            graph.replay()
            assert torch.equal(o, ttr.decode(**token, spec=spec, state=eager, params=params))
        for name, x in flatten(eager._trees()).items():
            assert torch.equal(x, flatten(state._trees())[name]), name

    def test_the_same_bits_every_time(self):
        spec = ttr.spec(GATED)
        _, given, _, state = tokens(spec, 3, torch.bfloat16, B=8, H=8, Hv=8, dk=128, dv=128)

        def run():
            own = state.clone()
            return [ttr.decode(**token, spec=spec, state=own) for token in given] + [own.weights["W"]]

        first = run()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))

    def test_nothing_outside_the_tile_is_read(self):
        """Odd sizes in the middle of poisoned buffers."""
        spec = ttr.spec(GATED)
        B, H, dk, dv = 2, 3, 24, 33

        def inside(*shape):
            buffer = torch.full((4096 + torch.Size(shape).numel() + 4096,), float("nan"), device="cuda")
            view = buffer[4096:-4096].view(shape)
            return buffer, view.copy_(torch.randn(shape))

        buffers, views = zip(*(inside(*s) for s in ((B, H, dk), (B, H, dk), (B, H, dv), (B, H, dk, dv))), strict=True)
        q, k, v, W = views
        o, last = ttr.regress(q[:, None], k[:, None], v[:, None], spec, step=0.5, log_decay=-0.1, initial_state=W.clone())
        got = ttr.decode(q, k, v, spec, ttr.State({"W": W}, spec_hash=spec.hash), step=0.5, log_decay=-0.1)
        torch.testing.assert_close(got, o[:, 0])
        torch.testing.assert_close(W, last.weights["W"])
        assert buffers[3][:4096].isnan().all() and buffers[3][-4096:].isnan().all()
