"""path='triton': what it serves and what it refuses, with which words; that it says what the other paths say."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import ttr
from ttr import registry, testing
from ttr.kernels.triton import eligible, sizes
from ttr.kernels.triton.eligible import why_not_chunks, why_not_triton

KERNEL, EVENTS, BEHIND = None, "one event at a time", "chunk"
# preset -> None (kernels over chunks), EVENTS (a kernel that goes over none), BEHIND (a kernel, slower than what auto takes), or a part of the
# reason for which the kernels do not serve it
PRESETS = {
    "deltanet": KERNEL, "gated_deltanet": KERNEL, "deltaproduct": KERNEL, "gated_deltaproduct": KERNEL, "lightning": KERNEL,
    "linear_attention": KERNEL,
    "linear_attention_unnormalised": KERNEL, "mamba2": KERNEL, "mlstm": KERNEL, "retnet": KERNEL,
    "gla": KERNEL, "kda": KERNEL, "rwkv7": KERNEL,
    "longhorn": EVENTS, "momentum_deltanet": KERNEL,
    "mesa": BEHIND, "mesanet": KERNEL,
    "softmax": "regressor 'kernel' has paths of its own", "softmax_window": "regressor 'kernel' has paths of its own",
    "titans": KERNEL, "ttt_linear": KERNEL, "ttt_mlp": KERNEL,
    "lact": "optimizer.accumulate=true",
    "yaad": "the gradient of objective 'huber' is not affine", "moneta": "the gradient of objective 'lp' is not affine",
    "atlas": "optimizer 'muon' is not linear and steps at every token",
    "omeganet": "objective.window=16 takes the gradient of several pairs", "memora": "mirror 'softmax' maps the weights",
}  # fmt: skip
DELTA = ttr.spec({"optimizer": "delta"})


def test_every_preset_is_served_or_the_reason_is_said():
    assert sorted(PRESETS) == sorted(ttr.presets())
    for name, reason in PRESETS.items():
        spec = ttr.spec(name)
        why = why_not_triton(spec)
        path, said = ttr.select_path(spec, device="cuda")
        if reason is None:
            assert (why, path) == (None, "triton"), name
            assert ttr.select_path(spec, device="cuda", length=3)[0] == ("recurrent" if spec.mini_batch == 1 else "triton")
            assert ttr.select_path(spec, path="triton")[0] == "triton", "on whichever device"
        elif reason is EVENTS:
            assert why is None and path == "triton" and "one event at a time, for none goes over chunks" in said, said
            assert reason in ttr.select_path(spec, path="triton")[1]
        elif reason is BEHIND:
            assert why is None and path == reason
            assert ttr.select_path(spec, path="triton", device="cuda")[0] == "triton"
        else:
            assert why is not None and reason in why, (name, why)
            assert path == ttr.select_path(spec)[0]
            assert why in said or path in ("sdpa", "dual", "definition")
            with pytest.raises(ValueError, match="path='triton' cannot serve this call: ") as error:
                ttr.select_path(spec, path="triton")
            assert reason in str(error.value) and f"choose from ['auto', '{path}'" in str(error.value)
        assert "triton" not in testing.targets(spec), "a CPU has it in the interpreter alone"


SIZES = {
    "float64": (
        {"dtype": torch.float64},
        "inputs (q, k, v, or a signal) are torch.float64; choose from ['torch.bfloat16', 'torch.float16', 'torch.float32']",
    ),
    "odd dk": ({"dk": 24}, "dk=24; choose a multiple of 16 up to 256"),
    "wide dv": ({"dk": 64, "dv": 512}, "dv=512; choose a multiple of 16 up to 256"),
    "old GPU": ({"capability": (8, 0)}, "the kernels need compute capability 9.0, this GPU has 8.0"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_dtypes_and_machines(name):
    known, reason = SIZES[name]
    path, why = ttr.select_path(DELTA, device="cuda", **known)
    assert path == "chunk" and why.endswith(f"no Triton kernel: {reason}")
    with pytest.raises(ValueError, match="path='triton' cannot serve this call") as error:
        ttr.select_path(DELTA, path="triton", device="cuda", **known)
    assert reason in str(error.value) and "choose from ['auto', 'chunk', 'recurrent', 'definition']" in str(error.value)
    assert ttr.select_path(DELTA, device="cuda", dtype=torch.bfloat16, dk=128, dv=64, capability=(9, 0))[0] == "triton"


def test_the_normaliser_needs_a_channel():
    assert ttr.select_path("mlstm", device="cuda", dk=64, dv=240)[0] == "triton"
    assert "dv=256 and the normaliser's channel pass 256; choose dv up to 240" in ttr.select_path("mlstm", device="cuda", dk=64, dv=256)[1]


def test_a_machine_without_triton(monkeypatch):
    monkeypatch.setattr(eligible, "has_triton", lambda: False)
    assert "triton is not installed (pip install" in eligible.why_not_machine("cuda", None)


def test_a_call_is_refused_with_the_reason():
    q = torch.randn(1, 9, 1, 24)
    with pytest.raises(
        ValueError, match=r"cannot serve this call: dk=24; choose a multiple of 16 up to 256; choose from \['auto', 'chunk'"
    ):
        ttr.regress(q, q, q, DELTA, step=0.5, path="triton")
    with pytest.raises(ValueError, match=r"path: 'triton' has no options, got 'chunk_size'"):
        ttr.regress(q[..., :16], q[..., :16], q[..., :16], DELTA, step=0.5, path={"kind": "triton", "chunk_size": 32})
    for argument in ("step", "initial_state"):  # float64 anywhere is float64 everywhere
        wide = {"step": 0.5, argument: torch.ones({"step": (1, 9, 1), "initial_state": (1, 1, 16, 16)}[argument], dtype=torch.float64)}
        with pytest.raises(ValueError, match=r"are torch\.float64"):
            ttr.regress(q[..., :16], q[..., :16], q[..., :16], DELTA, path="triton", **wide)
    with pytest.raises(ValueError, match=r"layer|dk=8"):
        ttr.Mixer(32, "deltanet", head_dim=8, path="triton")


def test_a_mixer_of_the_kernels_says_so():
    mixer = ttr.Mixer(32, "gated_deltanet", head_dim=16, expand_k=1.0, expand_v=1.0, path="triton")
    assert "path=triton" in repr(mixer) and ttr.explain(mixer).path == "triton"


def test_optimizers_are_probed(monkeypatch):
    monkeypatch.setattr(registry.OPTIMIZERS, "_classes", dict(registry.OPTIMIZERS._classes))

    def declare(name, **body):
        cls = type(name, (ttr.Optimizer,), {"linear": True, "__annotations__": {}, "__doc__": "A rule of a test.", **body})
        return ttr.spec({"optimizer": ttr.optimizer(name)(dataclass(frozen=True, kw_only=True)(cls))(), "objective": "l2"})

    assert why_not_chunks(declare("same", update=lambda self, z, g, s: (z[0] - s.step * g,))) is None
    assert "its b differs" in why_not_chunks(declare("half", update=lambda self, z, g, s: (z[0] - s.step * g / 2,)))
    for bounds in ((0, 1.5), (-1e3, 1e3), (1e-3, None)):  # another rule for steps that are seldom met
        bounded = declare(f"bounded by {bounds}", update=lambda self, z, g, s, bounds=bounds: (z[0] - s.step.clamp(*bounds) * g,))
        assert "its b differs" in why_not_chunks(bounded)
    assert "its A differs" in why_not_chunks(declare("shrinks", update=lambda self, z, g, s: (0.9 * z[0] - s.step * g,)))
    read = {"update": lambda self, z, g, s: (z[0] - s.step * g,), "read": lambda self, z, s: 2 * z[0]}
    assert "its read differs" in why_not_chunks(declare("doubles", **read))


VARIANTS = {
    "plain": {"optimizer": "delta"},
    "coupled": {"optimizer": "delta", "gate": {"kind": "scalar", "order": "coupled"}},
    "read before": {"optimizer": "delta", "gate": "scalar", "read": "before"},
    "mean": {"optimizer": "delta", "objective": {"kind": "l2", "reduce": "mean"}},
    "nlms": {"optimizer": {"kind": "nlms"}, "gate": "scalar"},
    "implicit": {"optimizer": {"kind": "implicit"}, "gate": "scalar"},
    "implicit mean": {"optimizer": {"kind": "implicit"}, "objective": {"kind": "l2", "reduce": "mean"}},
    "constant step": {"optimizer": {"kind": "delta", "step": 0.7}},
    "constant nlms": {"optimizer": {"kind": "nlms", "step": 0.7}},
    "constant gate": {"optimizer": "delta", "gate": {"kind": "scalar", "value": -0.2}},
    "listed decays": {"optimizer": "sgd", "gate": {"kind": "fixed", "decay": [-0.1, -0.2, -0.3, 0.0]}},
    "learned decays": {"optimizer": "sgd", "gate": {"kind": "fixed", "decay": "learned"}},
    "learned start": {"regressor": {"kind": "linear", "initial": "learned"}, "optimizer": "delta"},
    "normalised": {"optimizer": "sgd", "gate": "scalar", "read": {"normalizer": "sum"}},
    "normalised, with a learned start": {"optimizer": "sgd", "regressor": {"kind": "linear", "initial": "learned"}, "read": {"normalizer": "max1"}},
}  # fmt: skip


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_with_the_chunk_path(name):
    """Outputs, state and every gradient, in float32, with key heads shared by two value heads each."""
    case = testing.random_inputs(VARIANTS[name], T=19, B=1, H=2, Hv=4, dk=16, dv=16, extreme=False)
    testing.assert_close(testing.evaluate(case.to(torch.float32), "triton"), testing.evaluate(case, "chunk"), 2e-5, name)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("lengths", [(5, 0, 1, 13), (1,)], ids=str)
def test_packed_sequences(lengths):
    case = testing.random_inputs("gated_deltanet", T=19, B=len(lengths), H=1, Hv=2, dk=16, dv=16, extreme=False)
    packed = testing.pack(case, lengths)
    testing.assert_close(testing.evaluate(packed.to(torch.float32), "triton"), testing.evaluate(packed, "chunk"), 2e-5, "packed")
    wrong = packed.to(torch.float32)
    for bounds, match in (([0, 4], "expected 0 = c_0"), ([[0, 4]], "expected \\[N\\+1\\] int32")):
        arguments = dict(wrong.tensors, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        with pytest.raises(ValueError, match=match):
            ttr.regress(spec=wrong.spec, path="triton", **arguments)


@pytest.mark.usefixtures("interpreter")
def test_packed_and_normalised_states_come_back():
    case = testing.random_inputs("mlstm", T=12, B=2, dk=16, dv=16, extreme=False).to(torch.float32)
    whole = testing.evaluate(case, "chunk")
    testing.assert_close(testing.evaluate(case, "triton", splits=(5,)), whole, 2e-5, "split")
    packed = testing.pack(case, (12, 12))
    got = testing.evaluate(packed, "triton", gradients=False)
    testing.assert_close(
        {n: got[n] for n in ("weights.W", "weights.normalizer")}, {n: whole[n] for n in ("weights.W", "weights.normalizer")}, 2e-5, "packed"
    )


@pytest.mark.usefixtures("interpreter")
def test_states_are_checked():
    q = torch.randn(2, 9, 1, 16)
    _, state = ttr.regress(q, q, q, DELTA, step=0.5, path="triton")
    assert state.weights.keys() == {"W"} and state.spec_hash == DELTA.hash and state.weights["W"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"initial_state\.weights\.W: got shape \[2, 1, 16, 16\], expected \[1, 1, 16, 16\]"):
        ttr.regress(q[:1], q[:1], q[:1], DELTA, step=0.5, path="triton", initial_state=state)
    with pytest.raises(ValueError, match="another declaration"):
        ttr.regress(q, q, q, {"optimizer": "sgd"}, path="triton", initial_state=state)


@pytest.mark.usefixtures("interpreter")
def test_a_mixer_trains_along_the_kernels():
    torch.manual_seed(0)
    mixer = ttr.Mixer(32, "gated_deltanet", head_dim=16, expand_k=1.0, expand_v=1.0, path="triton")
    other = ttr.Mixer(32, "gated_deltanet", head_dim=16, expand_k=1.0, expand_v=1.0, path="chunk")
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 21, 32)
    for m in (mixer, other):
        m(x).square().sum().backward()
    for (name, p), r in zip(mixer.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, r.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.usefixtures("interpreter")
def test_bf16_is_refused_where_the_interpreter_gets_it_wrong():
    q = torch.randn(1, 20, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"interpreter computes wrong numbers in torch\.bfloat16; choose torch\.float32 or torch\.float16"):
        ttr.regress(q, q, q, "linear_attention_unnormalised", path="triton")


def test_devices_by_any_name():
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        assert ttr.select_path(DELTA, device=device)[0] == "triton"
    with pytest.raises(ValueError, match=r"device='gpu': expected a torch\.device or its name"):
        ttr.select_path(DELTA, device="gpu")
    with pytest.raises(ValueError, match=r"dtype='bf16': expected a torch\.dtype, as torch\.bfloat16"):
        ttr.select_path(DELTA, device="cuda", dtype="bf16")
    with pytest.raises(ValueError, match="path: got dict, expected a path's name"):
        ttr.select_path(DELTA, path={"kind": "chunk"})


TITANS = ttr.spec("titans", optimizer={"mini_batch": 32})
HIDDEN = ttr.spec("titans", regressor={"expansion": 1.5})
BY_CHANNEL = ttr.spec("mesanet", gate="vector")
REFUSED = {  # what compiles to wrong numbers in 16 bits, or has not been run on a GPU
    "heads": ("titans", 32, "on two layers the kernels are right with heads of 64 alone; choose those, or torch.float32"),
    "mini-batches": (TITANS, 64, "on two layers the kernels have been run with 16 and 64 tokens; choose those, or torch.float32"),
    "hidden units": (HIDDEN, 64, "hidden units that are no multiple of 64 in torch.bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sizes_that_no_gpu_has_seen_right_in_16_bits_are_refused(name, monkeypatch):
    monkeypatch.setattr(sizes, "interpreted", lambda: False)
    spec, d, why = REFUSED[name]
    with pytest.raises(ValueError, match=why):
        ttr.select_path(spec, path="triton", dtype=torch.bfloat16, dk=d, dv=d)
    assert ttr.select_path(spec, path="triton", dtype=torch.float32, dk=d, dv=d)[0] == "triton"


@pytest.mark.parametrize(
    ("name", "d"), [("gla", 32), ("kda", 128), ("rwkv7", 64), ("titans", 64), ("ttt_mlp", 64), ("mesanet", 64), ("deltaproduct", 256),
     (BY_CHANNEL, 64), (BY_CHANNEL, 256)],
)  # fmt: skip
def test_sizes_that_a_gpu_has_seen_are_taken(name, d, monkeypatch):
    monkeypatch.setattr(sizes, "interpreted", lambda: False)
    assert ttr.select_path(name, path="triton", dtype=torch.bfloat16, dk=d, dv=d)[0] == "triton"
