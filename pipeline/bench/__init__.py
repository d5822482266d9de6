"""Benchmarks: time, memory and precision of this pipeline, compared with common alternatives on the same machine."""
