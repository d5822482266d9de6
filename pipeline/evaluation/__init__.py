"""Scores of any model on held-out text and per-record predictions."""
