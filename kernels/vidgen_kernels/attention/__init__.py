"""Attention under masks of key intervals: frames that see the past, sets, packed sequences."""
