"""NOVA (arXiv 2412.14169): generates a video frame by frame, and a frame in sets of tokens.

Read in this order:

    model/      the network
        config         sizes, by the names of config.json
        embeddings     patches, positions, text, class, motion, special tokens
        vit            the transformer of both encoders, and its cache of keys and values
        video_encoder  features of a frame from the frames before it; mixer relates them to frame 0
        image_encoder  features of the tokens of a frame from those that are generated already
        set_causal     the same with a cache, by the spatial mask of the paper
        denoiser       the MLP that is run in every diffusion step of a token
        transformer    the whole network
        weights        loads official checkpoints
    sampling/   sampler (frame by frame), frames (set by set), denoising (diffusion steps of a set);
                schedules and steps, guidance, draws (random numbers), graphs (CUDA graphs)
    training/   loss, and the objective of `vidgen train`, which makes batches for it
    vae/        pixels to latents and back
    text        prompts to features; files of features
    pipeline    prompts, classes, images and clips to frames
    generate, train   the commands
    checks/     golden cases, example steps, small models; not needed to understand the model
"""
