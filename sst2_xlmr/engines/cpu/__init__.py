"""Kernels for a CPU: packed forward and backward pass, AdamW, shared memory."""
