"""The kinds of attention, one a file."""
