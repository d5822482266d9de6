"""Inspection of a cache: verify, summary, replay, show."""
