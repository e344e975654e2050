"""The two transformers: sizes, positions, layers, checkpoints."""
