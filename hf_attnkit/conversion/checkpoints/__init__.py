"""Conversion shard by shard."""
