"""Residuals, norms and modulation of token rows, and RepVideo's feature cache."""
