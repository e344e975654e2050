"""Pyramid Flow (arXiv 2410.05954): flow matching through a pyramid of resolutions.

Read in this order:

    model/      the network
        config        sizes, by the names of config.json
        positions     where tokens are in time and in the pyramid
        history       which finished frames a new one sees, at which resolution
        sequence      clips to tokens, packed columns, the mask
        kv_cache      keys and values that one unit leaves for the next
        attention     of text and video, and of what a cache holds
        layers        adaptive norms, blocks
        transformer   what both networks share; flux and mmdit are the networks
        weights       official checkpoints
    sampling/   from noise to latents: scheduler, sampler, run; config, guidance, noise: its options
    training/   the objective (loss), and the batches that `vidgen train` gives it (objective)
    vae/        pixels to latents and back: layers, vae, tiling, latents
    text        prompts to features; files of features
    pipeline    all of it: prompts, images and clips to frames; offload, for small devices
    generate, train   the commands
    checks/     golden cases, example inputs and weights; not needed to understand the model
"""
