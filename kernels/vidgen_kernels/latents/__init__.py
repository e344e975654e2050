"""Operators on latents: the pyramid of resolutions, training pairs, sampler steps, noise."""
