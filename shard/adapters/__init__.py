"""Adapters on the shard: fetched, parsed and packed in a child process, resident in the pool."""
