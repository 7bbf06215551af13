"""The tasks that come with the package, and how a user's own is found."""

from workers.tasks.classification import accuracy, cross_entropy, mlp, sample_classes
from workers.tasks.registry import TASKS, TaskSpec, recorded_task, task

__all__ = [
    "TASKS",
    "TaskSpec",
    "accuracy",
    "cross_entropy",
    "mlp",
    "recorded_task",
    "sample_classes",
    "task",
]
