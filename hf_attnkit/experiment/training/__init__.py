"""Ways to train a changed model."""
