"""Time and memory, sides alternately."""
