"""Choose heads and remove them."""
