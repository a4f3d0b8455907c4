"""What a run tells people: the console, metrics.jsonl, TensorBoard."""
