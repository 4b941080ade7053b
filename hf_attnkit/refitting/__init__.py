"""Fit projections to the untouched model in closed form."""
