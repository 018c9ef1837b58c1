"""The configurations of the nonlinear memories: written within a sequence, alive and finite from their default initialisation."""

from dataclasses import asdict

import pytest
import torch

from experiments import config
from experiments.model import build_module
from experiments.tasks import TaskData

NAMES = ("nonlinear", "in_context_regression")
MEMORIES = ("linear_attention", "ttt_mlp", "titans", "lact")


def module_of(name, label):
    experiment = config.load(name, [f"mixers=[{label}]"])
    [entry] = experiment.mixers
    torch.manual_seed(0)
    settings = experiment.config
    module = build_module(experiment.task, asdict(settings.model), entry.per_block(settings.model.n_layers), asdict(settings.train), 10)
    return module, TaskData(experiment.task, seed=0, steps=4, batch_size=8)


@pytest.mark.parametrize("label", MEMORIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_last_answer_depends_on_the_first_pair(name, label):
    module, data = module_of(name, label)
    inputs = data.split("train")[0][0]
    other = inputs.clone()
    other[:, 0] = inputs[:, 0].roll(1, dims=0)
    with torch.no_grad():
        answers, others = module.lm(inputs)[:, -1], module.lm(other)[:, -1]
    assert answers.isfinite().all()
    # beyond the reach of lact's window, so only the memory can know. TTT-MLP begins with small weights, and then the more so
    assert (answers - others).norm() > 1e-3 * answers.norm()


@pytest.mark.parametrize("label", MEMORIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_are_finite_and_reach_every_parameter(name, label):
    module, data = module_of(name, label)
    optimizer = module.configure_optimizers()["optimizer"]
    for batch in data.train_dataloader():
        optimizer.zero_grad()
        loss = module.loss(batch)
        loss.backward()
        assert loss.isfinite()
        for parameter_name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        optimizer.step()
