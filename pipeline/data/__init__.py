"""Text files in, batches out: records, tokens, packed sequences, and the order in which a run reads them."""
