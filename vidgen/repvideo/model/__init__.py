"""The network: sizes, positions, layers, transformer, checkpoints."""
