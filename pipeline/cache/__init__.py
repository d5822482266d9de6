"""The contract between the two stages: shard schema, manifest, shards, leases, downloads."""
