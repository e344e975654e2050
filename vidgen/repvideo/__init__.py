"""RepVideo (arXiv 2501.08994): CogVideoX whose layers see the mean of earlier ones.

Read in this order:

    model/      the network
        config        sizes, by the names of config.json
        positions     sine-cosine table, coordinates for rotation
        layers        the residual stream, attention, norms, blocks
        transformer   the network, with or without the feature cache
        keys          names of both checkpoint layouts; weights reads them
    sampling/   schedules (noise levels of both families of samplers), sampler (guidance, the loop)
    training/   the objective (loss), and the batches that `vidgen train` gives it (objective)
    vae/        latents to frames: diffusers' own
    text        prompts to features; files of features
    pipeline    all of it: text to video
    generate, train, convert   the commands
    analysis/   what the layers do (observe), drawn by `vidgen analyze` (analyze)
    checks/     golden cases, example inputs and weights; not needed to understand the model
"""
