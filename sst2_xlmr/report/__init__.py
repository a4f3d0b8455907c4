"""What a run tells people: the console and its header, metrics.jsonl, TensorBoard and its plots."""
