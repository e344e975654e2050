"""RepVideo (arXiv 2501.08994): CogVideoX whose layers see the mean of earlier ones.

Read in this order:

    config        sizes, by the names of config.json
    positions     sine-cosine table, coordinates for rotation
    layers        the residual stream, attention, norms, blocks
    transformer   the model, with or without the feature cache
    training      the objective; objective gives it batches of the command train
    schedules     noise levels of both samplers' families
    sampling      guidance and the loop
    text, vae     prompts to features, latents to frames
    pipeline      all of it: text to video
    keys          names of both checkpoint layouts; weights and convert use them
    analysis      what the layers do; analyze draws it
    golden*       recorded numbers of the official code, recomputed
"""
