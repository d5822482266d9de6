"""The self-test: does what this pipeline relies on hold on this machine and its GPUs? A table of checks."""
