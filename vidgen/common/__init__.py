"""What the models and commands share: files, arguments, progress, training loop, small blocks."""
