"""What is logged during training: metrics.jsonl, the health of a run, copies for external trackers."""
