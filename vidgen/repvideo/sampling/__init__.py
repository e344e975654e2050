"""From noise to latents: noise levels, guidance, the loop."""
