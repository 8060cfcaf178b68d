"""Exact derivatives of a loss along a direction, by group: the definition, and a sweep with the same numbers."""
