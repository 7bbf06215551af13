"""Training in one process: tasks, data, batches, gradients, the loop and its actor."""

from workers.config import RunConfig
from workers.task import Data, Task, TensorExamples, trained_model
from workers.tasks import task

__all__ = ["Data", "RunConfig", "Task", "TensorExamples", "task", "trained_model"]
