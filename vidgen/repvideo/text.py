"""Text for CogVideoX and RepVideo: T5 features of 226 tokens, padding included.

Padding is masked neither in T5 nor in the transformer. The unconditional features of guidance are,
in diffusers, those of a negative prompt, by default the empty one; in the released code of RepVideo
they are zeros, which replace a tenth of the prompts in training.

A file of features is safetensors with ``prompt_embeds`` and optionally ``negative_prompt_embeds``,
``[B, S, W]`` each, or ``[S, W]`` for one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidgen.common.checkpoint import write_state_dict
from vidgen.common.text_encoders import read_model, read_tokenizer

KEYS = "prompt_embeds", "negative_prompt_embeds"


class Prompts(NamedTuple):
    """Features ``[B, S, W]`` of the prompts, and the unconditional ones for guidance."""

    text: Tensor
    uncond: Tensor | None


class TextEncoder:
    """Prompts to features.

    Args:
        tokenizer, model: from transformers; the model is a `T5EncoderModel`.
        length: of the features in tokens; prompts are padded or cut to it.
    """

    def __init__(self, tokenizer: Any, model: nn.Module, length: int = 226) -> None:
        self.tokenizer, self.model, self.length = tokenizer, model, length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Features ``[B, length, W]``, in the dtype and on the device of the model."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.model(tokens.to(next(self.model.parameters()).device)).last_hidden_state


def load_text_encoder(
    folder: str | Path, tokenizer: str | Path | None = None, *, dtype: torch.dtype, length: int
) -> TextEncoder:
    """Loads T5 from a folder of transformers, safetensors only.

    Args:
        tokenizer: the folder of the tokenizer; default ``folder``.

    Raises:
        ValueError: a missing folder or missing weights.
    """
    import transformers

    kinds: Any = transformers  # it declares its tokenizers at run time, unseen by type checkers
    model = read_model(kinds.T5EncoderModel, folder, dtype)
    return TextEncoder(read_tokenizer(kinds.T5TokenizerFast, tokenizer or folder), model, length)


def read_features(tensors: Mapping[str, Tensor], width: int) -> Prompts:
    """Features from the tensors of a file, for a transformer with features of ``width``.

    Raises:
        ValueError: missing or unknown tensors, or other shapes.
    """
    if tensors.keys() not in ({KEYS[0]}, set(KEYS)):
        raise ValueError(
            f"embeddings: expected {KEYS[0]} and perhaps {KEYS[1]}, "
            f"got {', '.join(sorted(tensors)) or 'nothing'}"
        )
    found = []
    for name in KEYS:
        x = tensors.get(name)
        if x is not None:
            x = x[None] if x.ndim == 2 else x
            if x.ndim != 3 or x.shape[2] != width:
                raise ValueError(f"{name}: expected shape [B, S, {width}], got {list(x.shape)}")
        found.append(x)
    text, uncond = found
    if uncond is not None and uncond.shape != text.shape:
        expected = f"{list(text.shape)} as {KEYS[0]} has"
        raise ValueError(f"{KEYS[1]}: expected shape {expected}, got {list(uncond.shape)}")
    return Prompts(text, uncond)


def write_features(path: str | Path, prompts: Prompts) -> None:
    """Writes a file for `read_features`. Raises ValueError if ``path`` exists."""
    named = zip(KEYS, prompts, strict=True)
    write_state_dict(path, {key: x for key, x in named if x is not None})
