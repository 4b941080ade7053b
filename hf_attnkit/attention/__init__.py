"""Attention kinds, and what runs them in a model."""
