"""Change a model's heads: all or nothing."""
