"""Pyramid Flow (arXiv 2410.05954): flow matching through a pyramid of resolutions.

Read in this order:

    config        sizes, by the names of config.json
    positions     where tokens are in time and in the pyramid
    sequence      clips to tokens, packed columns, the mask
    layers        attention of text and video, adaptive norms, blocks
    transformer   what both models share; flux and mmdit are the models
    history       which finished frames a new one sees, at which resolution
    scheduler     noise levels and timesteps of the stages
    training      the objective; example builds a step of released size
    latents, vae  pixels to latents and back
    weights       official checkpoints
    golden*       recorded numbers of the official code, recomputed
"""
