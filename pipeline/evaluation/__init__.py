"""Held-out scores and the report over finished runs."""
