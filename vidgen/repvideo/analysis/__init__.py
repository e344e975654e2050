"""Measures and plots what the layers do with the frames of a video."""
