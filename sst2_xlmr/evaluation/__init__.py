"""A model over rows, its metrics, calibration, and the comparison of two precisions."""
