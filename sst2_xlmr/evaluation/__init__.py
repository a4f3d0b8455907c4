"""Metrics that are exact over all ranks."""
