"""Compare many changes of one model."""
