"""`ttr.decode` against the definition: the fused step in Triton's interpreter, and the fallback through `regress`."""

import pytest
import torch
from torch import library

import ttr
from ttr import testing
from ttr.kernels import decode as module
from ttr.kernels.triton.decode import op  # noqa: F401
from ttr.state import flatten

RULES = {
    "dot": {"objective": "dot", "optimizer": {"kind": "sgd", "step": "sigmoid"}},
    "delta": {"objective": "l2", "optimizer": {"kind": "delta", "step": "sigmoid"}},
}


def declaration(rule: str = "delta", gate: str = "scalar", order: str = "first", read: str = "after", **optimizer):
    body = RULES[rule]
    declared = gate if gate == "none" else {"kind": gate, "order": order}
    return ttr.spec({"regressor": "linear", **body, "optimizer": {**body["optimizer"], **optimizer}, "gate": declared, "read": read})


@pytest.fixture
def kernel(monkeypatch, device):
    """Decode through the kernel, and see how often."""
    calls = []

    def through(*args):
        calls.append(args)
        return run(*args)

    run = module._through_kernel
    monkeypatch.setattr(module, "kernel_runs", lambda _: True)
    monkeypatch.setattr(module, "_through_kernel", through)

    return calls


def call(spec, case, t, device):
    """The arguments of one token of a testing.Inputs, in float32."""
    tokens = {name: x if name == "log_decay" and x.ndim == 1 else x[:, t] for name, x in case.tensors.items()}
    tokens = {name: x.to(device, torch.float32) for name, x in tokens.items()}
    params = {name: p.to(device, torch.float32) for name, p in case.params.items()}
    return dict(tokens, params=params)


def start(spec, case, device, dtype=torch.float32):
    """A state after no tokens, every tensor of its own."""
    empty = case.tokens(0, 0)
    tensors = {name: x.to(device, dtype) for name, x in empty.tensors.items()}
    params = {name: p.to(device, dtype) for name, p in case.params.items()}
    initial = case.initial_state
    initial = initial.to(device, dtype) if isinstance(initial, torch.Tensor) else initial
    state = ttr.regress(**tensors, spec=spec, params=params, initial_state=initial)[1]
    return state._map(lambda x: x.clone(memory_format=torch.contiguous_format))


def check(spec, case, device, limit):
    """Decode every token of a case and hold outputs and state against the definition in float64."""
    spec = ttr.spec(spec)
    o_exact, last = ttr.regress(
        **case.tensors, spec=spec, params=case.params, initial_state=case.initial_state, path="definition"
    )  # fmt: skip
    state = start(spec, case, device)
    held = {name: (x, x.data_ptr()) for name, x in flatten(state._trees()).items()}
    with torch.no_grad():
        o = torch.stack([ttr.decode(**call(spec, case, t, device), spec=spec, state=state) for t in range(o_exact.shape[1])], 1)
    torch.testing.assert_close(o.cpu().double(), o_exact, atol=limit, rtol=limit)
    for name, exact in flatten(last._trees()).items():
        tensor, pointer = held[name]
        assert flatten(state._trees())[name] is tensor and tensor.data_ptr() == pointer, f"{name} was replaced"
        torch.testing.assert_close(tensor.cpu().to(exact.dtype), exact, atol=limit, rtol=limit, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate, order", [("none", "first"), ("fixed", "first"), ("scalar", "first"), ("scalar", "coupled")])
@pytest.mark.parametrize("read", ["after", "before"])
def test_family(rule, gate, order, read, kernel, device):
    spec = declaration(rule, gate, order, read)
    check(spec, testing.random_inputs(spec, T=5, H=2, Hv=4, dk=8, dv=8), device, 2e-5)
    assert len(kernel) == 5


def test_learned_decays(kernel, device):
    spec = declaration().to_dict() | {"gate": {"kind": "fixed", "decay": "learned"}}
    check(spec, testing.random_inputs(spec, T=3, H=1, Hv=2, dk=8, dv=8), device, 2e-5)
    assert len(kernel) == 3


@pytest.mark.parametrize("dk, dv", [(5, 3), (16, 33), (24, 40), (1, 1), (64, 16)])
def test_sizes(dk, dv, kernel, device):
    spec = declaration()
    check(spec, testing.random_inputs(spec, T=3, H=1, Hv=3, dk=dk, dv=dv), device, 2e-5)
    assert len(kernel) == 3


@pytest.mark.parametrize("rule", ["nlms", "implicit"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_step_rules_and_mean(rule, reduce, kernel, device):
    spec = ttr.spec(declaration(step_rule=rule).to_dict() | {"objective": {"kind": "l2", "reduce": reduce}})
    check(spec, testing.random_inputs(spec, T=3, H=2, Hv=4, dk=8, dv=6), device, 2e-5)
    assert len(kernel) == 3


def draw(device, B=2, H=1, Hv=2, dk=8, dv=4):
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (B, H, dk), "k": (B, H, dk), "v": (B, Hv, dv), "W": (B, Hv, dk, dv)}
    return [torch.randn(*shape, generator=generator).to(device) for shape in shapes.values()]


def state_of(spec, W):
    return ttr.State({"W": W.clone()}, spec_hash=ttr.spec(spec).hash)


def test_a_gate_of_minus_infinity_forgets_all(kernel, device):
    q, k, v, W = draw(device)
    spec = declaration("dot")
    state = state_of(spec, W)
    o = ttr.decode(q, k, v, spec, state, step=1.0, log_decay=float("-inf"), scale=1.0)
    new = k[:, :, :, None] * v[:, :, None]
    torch.testing.assert_close(state.weights["W"], new)
    torch.testing.assert_close(o, torch.einsum("bhk,bhkv->bhv", q.expand(2, 2, 8), new))


@pytest.mark.parametrize("form", ["number", "zero_dim", "heads", "tokens", "strided"])
def test_forms_of_a_signal(form, kernel, device):
    q, k, v, W = draw(device)
    spec = declaration()
    forms = {
        "number": (0.5, -0.25),
        "zero_dim": (torch.tensor(0.5, device=device), torch.tensor(-0.25, device=device)),
        "heads": (torch.tensor([0.5, 0.25], device=device), torch.tensor([-0.25, 0.0], device=device)),
        "tokens": (torch.rand(2, 2, device=device), -torch.rand(2, 2, device=device)),
        "strided": (torch.rand(2, 2, device=device).T, -torch.rand(2, 4, device=device)[:, ::2]),
    }
    step, decay = forms[form]

    def full(x):
        return x.expand(2, 2)[:, None] if isinstance(x, torch.Tensor) else x

    o, last = ttr.regress(
        q[:, None], k[:, None], v[:, None], spec, step=full(step), log_decay=full(decay), initial_state=W, path="definition"
    )  # fmt: skip
    state = state_of(spec, W)
    torch.testing.assert_close(ttr.decode(q, k, v, spec, state, step=step, log_decay=decay), o[:, 0])
    torch.testing.assert_close(state.weights["W"], last.weights["W"])
    assert len(kernel) == 1


def test_views_of_one_projection(kernel, device):
    """q, k and v need no copies: any strides of batch and head."""
    qkv = torch.randn(2, 2, 24, device=device)
    q, k, v = qkv.split([8, 8, 8], -1)
    spec, W = declaration(), torch.randn(2, 2, 8, 8, device=device)
    views, copies = state_of(spec, W), state_of(spec, W)
    got = ttr.decode(q, k, v.transpose(0, 1), spec, views, step=0.5, log_decay=-0.1)
    want = ttr.decode(q.contiguous(), k.contiguous(), v.transpose(0, 1).contiguous(), spec, copies, step=0.5, log_decay=-0.1)
    assert torch.equal(got, want) and torch.equal(views.weights["W"], copies.weights["W"])


@pytest.mark.parametrize("launch", [(4, 1), (8, 1), (16, 2), (32, 4)])
def test_any_tile_is_right(launch, device):
    from ttr.kernels.triton.decode.run import step_in_place

    q, k, v, W = draw(device, dk=16, dv=40)
    spec = declaration()
    o, last = ttr.regress(q[:, None], k[:, None], v[:, None], spec, step=0.5, log_decay=-0.1, initial_state=W, scale=0.5)
    state = W.clone()
    options = (0.5, -0.1, 1.0, 0.0, 0.5, True, False, False, "plain")
    torch.testing.assert_close(step_in_place(q, k, v, None, None, state, *options, launch=launch), o[:, 0])
    torch.testing.assert_close(state, last.weights["W"])


SEPARATE = {"kind": "delta", "step": {"per": "key"}, "write_key": "separate", "steps": 2}
EVENTS = {  # several pairs, numbers by channel, keys to write with
    "gla": "gla", "kda": "kda", "rwkv7": "rwkv7", "gated_deltaproduct": "gated_deltaproduct", "longhorn": "longhorn",
    "vector, 3 pairs, before": declaration(gate="vector", read="before", steps=3),
    "coupled, separate, 2 pairs": {"optimizer": SEPARATE, "gate": {"kind": "vector", "order": "coupled"}},
    "separate, mean": {"optimizer": {**SEPARATE, "step": 0.5}, "objective": {"kind": "l2", "reduce": "mean"}, "gate": "scalar"},
    "implicit by key": declaration(gate="vector", step={"per": "key"}, step_rule="implicit", steps=2),
    "nlms by value": declaration(gate="none", step={"per": "value"}, step_rule="nlms"),
    "one step for all": declaration(gate="none", step=0.5, steps=2),
}  # fmt: skip


@pytest.mark.parametrize("name", EVENTS)
def test_events(name, kernel, device):
    """More than one pair with a number a head."""
    spec = ttr.spec(EVENTS[name])
    check(spec, testing.random_inputs(spec, T=3, H=2, Hv=4, dk=5, dv=6), device, 2e-5)
    assert len(kernel) == 3 and not module.step_of(spec).plain


def test_a_step_per_tensor_is_no_kernels(device):
    """[B, Hv, 1]: neither a number a head nor one a value channel."""
    spec = declaration(gate="none", step={"per": "tensor"})
    assert not module.step_of(spec).fused
    for Hv in (1, 2):
        check(spec, testing.random_inputs(spec, T=3, H=1, Hv=Hv, dk=5, dv=6), device, 2e-5)


@pytest.mark.parametrize("given", ["heads", "batch", "number"])
def test_a_signal_by_channel_given_otherwise(given, kernel, device):
    """A decay of all channels of a head, pairs without an axis of their own."""
    spec = declaration(gate="vector", steps=2)
    q, k, v, W = draw(device)
    step, decay = torch.rand(2, 2, device=device), {"heads": -torch.rand(2), "batch": -torch.rand(2, 2), "number": -0.25}[given]
    decay = decay.to(device) if isinstance(decay, torch.Tensor) else decay
    full = decay if given != "batch" else decay[:, None]
    o, last = ttr.regress(q[:, None], k[:, None], v[:, None], spec, step=step[:, None], log_decay=full, initial_state=W, path="definition")
    state = state_of(spec, W)
    torch.testing.assert_close(ttr.decode(q, k, v, spec, state, step=step, log_decay=decay), o[:, 0])
    torch.testing.assert_close(state.weights["W"], last.weights["W"])
    assert len(kernel) == 1


# momentum, an mlp memory, least squares, a normalizer, an open mini-batch, a fixed gate with momentum
FALLBACK = [
    "momentum_deltanet", "ttt_mlp", "mesanet", "mesa", "mlstm", "titans", "ttt_linear", {"optimizer": "momentum", "gate": "fixed"},
]  # fmt: skip


@pytest.mark.parametrize("spec", FALLBACK, ids=str)
def test_everything_else_goes_through_regress(spec, kernel, device):
    spec = ttr.spec(spec)
    check(spec, testing.random_inputs(spec, T=4, H=1, Hv=2, dk=4, dv=4), device, 1e-3)
    assert not kernel


def test_float64_stays_float64(kernel, device):
    q, k, v, W = (x.double() for x in draw(device))
    spec = declaration()
    o, last = ttr.regress(q[:, None], k[:, None], v[:, None], spec, step=0.5, log_decay=-0.1, initial_state=W, path="definition")
    state = state_of(spec, W)
    torch.testing.assert_close(ttr.decode(q, k, v, spec, state, step=0.5, log_decay=-0.1), o[:, 0])
    torch.testing.assert_close(state.weights["W"], last.weights["W"])
    assert not kernel and state.weights["W"].dtype == torch.float64


def test_prefill_then_decode(kernel, device):
    spec = declaration()
    case = testing.random_inputs(spec, T=9, dk=8, dv=8, state=False, extreme=False).to(torch.float32).to(device)
    whole, last = ttr.regress(**case.tensors, spec=spec)
    _, state = ttr.regress(**case.tokens(0, 8).tensors, spec=spec)
    o = ttr.decode(**call(spec, case, 8, device), spec=spec, state=state)
    torch.testing.assert_close(o, whole[:, 8])
    torch.testing.assert_close(state.weights["W"], last.weights["W"])


def test_a_cache_that_grows_is_refused():
    q, k, v, _ = draw("cpu", H=2)
    state = ttr.regress(q[:, None], k[:, None], v[:, None], "softmax")[1]
    with pytest.raises(ValueError, match=r"state.weights.k grows with every token \(\[2, 2, 1, 8\] -> \[2, 2, 2, 8\]\)"):
        ttr.decode(q, k, v, "softmax", state)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(q=a["q"][:, None]), r"q: got shape \[2, 1, 1, 8\], expected \[B, H, dk\]"),
        (lambda a: a.update(k=a["k"][..., :4]), r"k: got shape \[2, 1, 4\], expected \[2, 1, 8\] as q"),
        (lambda a: a.update(v=a["v"][:1]), r"v: got shape \[1, 2, 4\], expected \[2, Hv, dv\]"),
        (lambda a: a.update(q=a["q"].repeat(1, 3, 1), k=a["k"].repeat(1, 3, 1)), "v: got 2 value heads, expected a multiple of q's 3"),
        (lambda a: a.update(q=a["q"].long()), "q: got dtype torch.int64, expected a floating-point dtype"),
        (lambda a: a.update(v=[1.0]), "v: got list, expected a tensor"),
        (lambda a: a.update(step=torch.ones(2, 3)), r"step: got shape \[2, 3\], expected \[2\] or \[2, 2\]"),
        (lambda a: a.update(log_decay=torch.ones(2, 1, 2)), r"log_decay: got shape \[2, 1, 2\], expected \[2\] or \[2, 2\], natural log"),
        (lambda a: a.update(log_decay=0.9), "log_decay=0.9: expected a natural log <= 0"),
        (lambda a: a.update(step=None), r"step is missing: it is declared per token; pass its values, \[2\] or \[2, 2\]"),
        (lambda a: a.update(step="half"), "step: got str, expected a tensor or a number"),
        (lambda a: a.update(momentum=0.5), "momentum"),
        (lambda a: a.update(scale=float("nan")), "scale=nan: expected a finite number"),
        (lambda a: a.update(write_key=a["k"]), "write_key was given"),
        (lambda a: a.update(state=a["state"].weights["W"]), "state: got Tensor, expected a ttr.State"),
        (lambda a: a.update(spec=declaration("dot")), "state was made under another declaration"),
        (lambda a: a["state"].weights.update(W=a["state"].weights["W"][:, :1]), r"state.weights.W: got shape \[2, 1, 8, 4\], expected \[2, 2, 8, 4\]"),
        (lambda a: a["state"].weights.update(W=a["state"].weights["W"].half()), "state.weights.W: got dtype torch.float16, expected torch.float32"),
        (lambda a: a["state"].weights.update(W=torch.zeros(2, 2, 4, 8).mT), "state.weights.W: got strides .*expected a contiguous tensor"),
        (lambda a: a["v"].requires_grad_(), "v requires a gradient, and decode overwrites the state"),
        (lambda a: a.update(step=torch.ones(2, requires_grad=True)), "step requires a gradient"),
        (lambda a: a["state"].weights["W"].requires_grad_(), "state.weights.W requires a gradient"),
    ],
)  # fmt: skip
def test_errors(change, message, kernel):
    q, k, v, W = draw("cpu")
    spec = declaration()
    arguments = {"q": q, "k": k, "v": v, "spec": spec, "state": state_of(spec, W), "step": torch.ones(2, 2), "log_decay": -torch.ones(2, 2)}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        ttr.decode(**arguments)


@pytest.mark.parametrize("name", ["momentum_deltanet", "ttt_linear"])
def test_a_state_that_shares_memory_is_refused(name):
    spec = ttr.spec(name)
    case = testing.random_inputs(spec, T=1, dk=4, dv=4, state=False)
    state = ttr.regress(**case.tokens(0, 0).tensors, spec=spec, params=case.params)[1]
    token = {n: x[:, 0] for n, x in case.tensors.items()}
    with pytest.raises(ValueError, match=r"cannot be updated in place; pass state.clone\(\)"):
        ttr.decode(**token, spec=spec, state=state, params=case.params)
    assert ttr.decode(**token, spec=spec, state=state.clone(), params=case.params).isfinite().all()


@pytest.mark.parametrize("numbers", [False, True])
def test_operator(numbers, device):
    q, k, v, W = draw(device)
    step, decay = (None, None) if numbers else (torch.rand(2, 2, device=device), -torch.rand(2, 2, device=device))
    arguments = (q, k, v, step, decay, W, 0.5, 0.0, 1.0, 0.0, 0.3, True, False, False, "plain")
    library.opcheck(torch.ops.ttr.scalar_gate_step.default, arguments)


def test_the_operator_of_events(device):
    q, k, v, W = draw(device)
    k, v, step, decay = k[:, None].expand(2, 2, 1, 8), v[:, None].expand(2, 2, 2, 4), torch.rand(2, 2, 2, 8), -torch.rand(2, 2, 8)
    arguments = (q, k, v, k, step.to(device), decay.to(device), W, 1.0, 0.0, 1.0, 0.5, 0.0, 0.3, True, True, False, "plain", "key", "key")
    library.opcheck(torch.ops.ttr.events_step.default, arguments)


def test_under_compile(kernel, device):
    spec = declaration(gate="fixed")
    q, k, v, W = draw(device)
    eager, compiled = state_of(spec, W), state_of(spec, W)
    run = torch.compile(lambda q, k, v, state: ttr.decode(q, k, v, spec, state, step=0.5), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(q, k, v, compiled), ttr.decode(q, k, v, spec, eager, step=0.5))
    torch.testing.assert_close(compiled.weights["W"], eager.weights["W"])
