"""Captures of several models over one corpus become one cache: pools of distributions, and their weights."""
