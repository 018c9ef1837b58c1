"""The tasks, by the `kind` that a config names. A new one is a dataclass like these and a line here."""

from experiments.tasks.base import Segment, Split, Task, TaskData, slice_name, slice_names
from experiments.tasks.in_context_regression import InContextRegression, VectorBatch
from experiments.tasks.interface import Interface, Score, Tokens, Vectors
from experiments.tasks.mqar import MQAR, ForgettingMQAR, ForgettingSegment, MQARSegment
from experiments.tasks.overwrite import Overwrite
from experiments.tasks.recall import IGNORE, Batch, recall_examples

TASKS: dict[str, type] = {
    "mqar": MQAR,
    "forgetting_mqar": ForgettingMQAR,
    "overwrite": Overwrite,
    "in_context_regression": InContextRegression,
}

__all__ = [
    "IGNORE",
    "MQAR",
    "TASKS",
    "Batch",
    "ForgettingMQAR",
    "ForgettingSegment",
    "InContextRegression",
    "Interface",
    "MQARSegment",
    "Overwrite",
    "Score",
    "Segment",
    "Split",
    "Task",
    "TaskData",
    "Tokens",
    "VectorBatch",
    "Vectors",
    "recall_examples",
    "slice_name",
    "slice_names",
]
