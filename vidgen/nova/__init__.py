"""NOVA (arXiv 2412.14169): video by frames in time and sets of tokens in space."""
