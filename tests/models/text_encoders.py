"""Tiny text encoders whose vocabulary is eight letters, written in the layout of checkpoints.

Tests of pipelines and commands use them in place of T5 and CLIP.
"""

from pathlib import Path

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,  # type: ignore[attr-defined]
)

LETTERS = "abcdefgh"
N_CLIP = 9  # tokens that the tiny CLIP reads


def clip_tokenizer(n_tokens: int = N_CLIP) -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=n_tokens)


def t5_tokenizer() -> T5TokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *(f"▁{letter}" for letter in LETTERS)]
    return T5TokenizerFast(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0)


def clip_config(projection: int = 6) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=2 + len(LETTERS),
        hidden_size=8,
        intermediate_size=8,
        projection_dim=projection,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=3 + len(LETTERS), d_model=10, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config).eval()


def write_flux(folder: Path) -> None:
    CLIPTextModel(clip_config()).save_pretrained(folder / "text_encoder")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    t5().save_pretrained(folder / "text_encoder_2")
    t5_tokenizer().save_pretrained(folder / "tokenizer_2")


def write_sd3(folder: Path) -> None:
    for suffix, projection in (("", 6), ("_2", 4)):
        clip = CLIPTextModelWithProjection(clip_config(projection))
        clip.save_pretrained(folder / f"text_encoder{suffix}")
        clip_tokenizer().save_pretrained(folder / f"tokenizer{suffix}")
    t5().save_pretrained(folder / "text_encoder_3")
    t5_tokenizer().save_pretrained(folder / "tokenizer_3")
