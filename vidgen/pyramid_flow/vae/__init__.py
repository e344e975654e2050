"""The causal video VAE: pixels to latents and back."""
