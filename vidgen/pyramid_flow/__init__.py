"""Pyramid Flow (arXiv 2410.05954): flow matching through a pyramid of resolutions.

Read in this order:

    config        sizes, by the names of config.json
    positions     where tokens are in time and in the pyramid
    sequence      clips to tokens, packed columns, the mask
    attention     of text and video, and of what a cache holds
    layers        adaptive norms, blocks
    transformer   what both models share; flux and mmdit are the models
    history       which finished frames a new one sees, at which resolution
    scheduler     noise levels and timesteps of the stages
    sampling      from noise to latents; sampling_config, guidance and noise are its options,
                  sampling_run what lasts while a video is made
    kv_cache      keys and values that one unit leaves for the next
    training      the objective; example builds a step of released size, objective gives it
                  batches of the command train
    latents, vae  pixels to latents and back
    weights       official checkpoints
    text          prompts to features; files of features
    pipeline      all of it: prompts, images and clips to frames; offload, for small devices
    generate      the command; random_weights is what it runs without a checkpoint
    golden*       recorded numbers of the official code, recomputed
"""
