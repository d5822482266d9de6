"""Stage one: the teacher runs over the corpus and writes shards."""
