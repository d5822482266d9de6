"""Text files in, packed sequences and training batches out."""
