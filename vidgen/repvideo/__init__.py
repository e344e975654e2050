"""RepVideo (arXiv 2501.08994): CogVideoX whose layers also read the mean of earlier outputs.

Read in this order:

    model/      the network
        config        sizes, by the names of config.json
        positions     sine-cosine table, coordinates for rotary positions
        layers        the residual stream, attention, norms, blocks
        transformer   the network, with or without the feature cache
        keys          names of weights in both checkpoint layouts
        weights       loads checkpoints of either layout
    sampling/   schedules (noise levels of SAT and of diffusers), sampler (guidance, the loop)
    training/   loss, and the objective of `vidgen train`, which makes batches for it
    vae/        latents to frames, by diffusers' VAE
    text        prompts to features; files of features
    pipeline    text to video
    generate, train, convert   the commands
    analysis/   observe (measures what the layers do), analyze (`vidgen analyze`, which plots it)
    checks/     golden cases, example steps, small models; not needed to understand the model
"""
