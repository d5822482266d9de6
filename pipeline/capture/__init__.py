"""Stage one: the teacher runs over the corpus once, and its top-k logits are written as shards."""
