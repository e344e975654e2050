"""Queries and keys: norm, rotation, head layout, in one pass from the projection."""
