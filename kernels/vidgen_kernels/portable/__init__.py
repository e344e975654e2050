"""The CPU implementations, registered for the same operators as the kernels."""
