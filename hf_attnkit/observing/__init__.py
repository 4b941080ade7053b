"""Look at a running model."""
