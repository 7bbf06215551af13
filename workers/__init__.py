"""Training in one process: tasks, data, batches, gradients, the loop and its actor."""
