"""GLUE tasks."""
