"""Scores of any model on held-out text, per-record predictions, and the report over finished runs."""
