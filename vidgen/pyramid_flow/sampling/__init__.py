"""From noise to latents: options, noise levels, guidance, the loop."""
