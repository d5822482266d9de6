"""Stage two: a driver starts ranks, in which DeepSpeed trains the student on shards and gold."""
