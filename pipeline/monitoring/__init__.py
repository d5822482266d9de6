"""metrics.jsonl, the health of a run, and external trackers."""
