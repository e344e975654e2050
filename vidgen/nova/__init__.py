"""NOVA (arXiv 2412.14169): video by frames in time and sets of tokens in space.

Read in this order:

    model/      the network
        config         sizes, by the names of config.json
        embeddings     patches, positions, text, class, motion, special tokens
        vit            the transformer of both encoders, and the cache of its keys and values
        video_encoder  features of a frame from those before it; mixer relates them to the first
        image_encoder  what the tokens of a frame should become, set by set
        set_causal     the same with a cache: the paper's own spatial mask
        denoiser       the MLP that samples a token
        transformer    all of them under one roof
        weights        official checkpoints
    sampling/   schedules (noise levels, sizes of sets), then sampler: frame by frame; frames,
                denoising, draws, guidance, graphs below it
    training/   the objective (loss), and the batches that `vidgen train` gives it (objective)
    vae/        pixels to latents and back
    text        prompts to features; files of features
    pipeline    all of it: prompts, classes, images and clips to frames
    generate, train   the commands
    checks/     golden cases, example inputs and weights; not needed to understand the model
"""
