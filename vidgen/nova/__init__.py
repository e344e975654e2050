"""NOVA (arXiv 2412.14169): video by frames in time and sets of tokens in space.

Read in this order:

    config         sizes, by the names of config.json
    embeddings     patches, positions, text, class, motion, special tokens
    vit            the transformer of both encoders, and the cache of its keys and values
    video_encoder  features of a frame from those before it; mixer relates them to the first
    image_encoder  what the tokens of a frame should become, set by set
    set_causal     the same with a cache: the paper's own spatial mask
    denoiser       the MLP that samples a token
    transformer    all of them under one roof
    training       the objective; objective gives it batches of the command train
    schedules      noise levels, sizes of sets
    sampling       frame by frame; frames, denoising, draws, guidance below it
    text, vae      prompts to features, pixels to latents and back
    weights        official checkpoints
    golden*        recorded numbers of the official code, recomputed
"""
