"""Ways to merge key/value heads, one a file."""
