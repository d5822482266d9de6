"""Values that every other package shares; nothing of ours lies below."""
