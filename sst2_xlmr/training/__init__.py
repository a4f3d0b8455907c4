"""The step, the optimizer, and what keeps a run whole."""
