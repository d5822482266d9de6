"""The cache that stage one writes and stage two reads: Parquet shards with a manifest, local or in a store."""
