"""The step, the optimizer, and the state of a run with its checkpoints."""
