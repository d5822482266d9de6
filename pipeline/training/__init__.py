"""Stage two: the student trains on shards and gold under the combined loss."""
