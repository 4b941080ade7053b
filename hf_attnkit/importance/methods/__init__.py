"""Scores of heads, one a file."""
