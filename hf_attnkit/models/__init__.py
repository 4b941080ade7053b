"""What a model's attention is."""
