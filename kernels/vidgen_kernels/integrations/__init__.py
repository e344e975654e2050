"""Small reversible patches that bring the kernels into other people's models."""
