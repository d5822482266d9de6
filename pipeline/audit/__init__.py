"""Inspection of a cache: verify it, summarize it, compare it with its teacher (replay), print it as text (show).

Nothing here writes into a cache.
"""
