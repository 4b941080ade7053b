"""Attention implementations: one file each, all with the same signature, listed in `registry`."""
