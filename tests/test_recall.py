"""M*(q): a memory read without learning."""

import pytest
import torch

import ttr
from ttr import testing
from ttr.kernels.recall import recall


@pytest.mark.parametrize("name", ["ttt_mlp", "moneta", "memora", "titans"])
def test_what_a_token_of_step_zero_reads(name):
    spec = ttr.spec(name, optimizer={"mini_batch": 4, "position": "none"})
    case = testing.random_inputs(spec, T=8, B=1, H=1, Hv=1, dk=8, dv=8, extreme=False)
    _, state = testing.call(case)
    still = {"step": 0.0, "log_decay": 0.0, "momentum": 0.0}
    still = {signal: x for signal, x in still.items() if signal in spec.signals()}
    q, k, v = (case.tensors[x][:, :1] for x in "qkv")
    if spec.optimizer.slots:  # what it carries moves the weights, step or not
        state = state._with({**state._trees(), "slots": {"momentum": {n: 0 * x for n, x in state.slots["momentum"].items()}}})
    read, _ = ttr.regress(q, k, v, spec, params=case.params, initial_state=state, **still)
    torch.testing.assert_close(recall(q, spec, state, case.params), read)


@pytest.mark.parametrize("path", ["dual", "definition"])
@pytest.mark.parametrize("length", [4, 5, 8])
def test_decoding_goes_on_wherever_the_prompt_ends(path, length):
    spec = ttr.spec("ttt_linear", optimizer={"mini_batch": 4})
    case = testing.random_inputs(spec, T=9, B=1, H=1, Hv=1, dk=8, dv=8)
    whole, _ = testing.call(case, path)
    _, state = testing.call(case.tokens(0, length), path)
    x = {name: t[:, length] for name, t in case.tensors.items()}
    o = ttr.decode(x.pop("q"), x.pop("k"), x.pop("v"), spec, state.clone(), params=case.params, **x)
    torch.testing.assert_close(o, whole[:, length])
