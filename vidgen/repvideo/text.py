"""Text for CogVideoX and RepVideo: T5 features of 226 tokens, padding included.

Padding is neither masked in T5 nor in the transformer. Guidance leads away from the features of a
negative prompt, by default the empty one, in diffusers; in the code that RepVideo is released with
from zeros, which training puts in the place of a tenth of the prompts.

A file of features is safetensors with ``prompt_embeds`` and perhaps ``negative_prompt_embeds``,
``[B, S, W]`` each, or ``[S, W]`` of one prompt.
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
    """Features ``[B, S, W]`` of the prompts and of what guidance leads away from."""

    text: Tensor
    uncond: Tensor | None


class TextEncoder:
    """Prompts to features.

    Args:
        tokenizer, model: of transformers, `T5EncoderModel`.
        length: tokens of a prompt; longer ones are cut.
    """

    def __init__(self, tokenizer: Any, model: nn.Module, length: int = 226) -> None:
        self.tokenizer, self.model, self.length = tokenizer, model, length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """``[B, length, W]`` in the dtype of the model, where it is."""
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
    """T5 in a folder of transformers, safetensors only; ``tokenizer``: its folder, if another one.

    Raises:
        ValueError: a folder or weights missing.
    """
    import transformers

    kinds: Any = transformers  # which declares its tokenizers at run time
    model = read_model(kinds.T5EncoderModel, folder, dtype)
    return TextEncoder(read_tokenizer(kinds.T5TokenizerFast, tokenizer or folder), model, length)


def read_features(tensors: Mapping[str, Tensor], width: int) -> Prompts:
    """The features in a file, for a transformer that reads ``width`` of each token.

    Raises:
        ValueError: tensors missing or left over, or of another shape.
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
    """A new file of features. Raises ValueError where ``path`` exists."""
    named = zip(KEYS, prompts, strict=True)
    write_state_dict(path, {key: x for key, x in named if x is not None})
