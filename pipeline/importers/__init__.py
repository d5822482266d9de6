"""Converts the teacher outputs that other projects have stored into a cache, instead of a capture."""
