"""What computes the kinds."""
