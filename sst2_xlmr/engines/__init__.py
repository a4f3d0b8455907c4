"""Faster ways to compute the same; everything works without this folder."""
