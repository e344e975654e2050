"""Pyramid Flow (arXiv 2410.05954): flow matching through a pyramid of resolutions.

A video is made one unit (a latent frame or several) after another, each at growing resolutions.
Finished frames are history for the next unit, the older the smaller. Read in this order:

    model/      the two transformers
        config        sizes, with the names of config.json
        history       which finished frames a new one sees, at which resolution
        positions     positions of tokens in time and in the picture
        sequence      from clips to patches, packed columns, the mask
        layers        modulated norms and blocks; attention, which they call
        transformer   what both transformers share; flux and mmdit are the two
        kv_cache      keys and values that the units of a video share
        weights       official checkpoints
    sampling/   from noise to latents
        sampler       the loop; state is what it keeps, velocity its calls of the model
        scheduler     noise levels and timesteps
        config, guidance, noise   its options
    training/   loss; objective connects it to `vidgen train`
    vae/        pixels to latents and back: layers, vae, tiling, latents
    text        prompts to features; files of features
    pipeline    prompts, images and clips to frames; offload is for small devices
    generate, train   the commands
    checks/     golden cases, example inputs and weights; not needed to understand the model
"""
