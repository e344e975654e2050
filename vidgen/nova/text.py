"""Text for NOVA: features of a language model, one vector per token of the prompt.

The features are the last hidden state of Phi-2 after its final norm, for at most 256 tokens. Each
prompt is encoded by itself, without padding. The transformer fills the features up to 256 rows from
its own learned table (`model.embeddings.TextEmbed`); an empty prompt has no features, only that
table.

Shapes: n tokens of a prompt, D width of the language model (2560).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidgen.common.checkpoint import load_exactly, read_config, read_state_dict, write_state_dict
from vidgen.common.text_encoders import read_tokenizer

MAX_LENGTH = 256  # `text_token_len` of the released models
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
KEYS = {"prompt": "prompt_embeds", "negative": "negative_prompt_embeds"}


class TextFeatures(NamedTuple):
    """Features of the prompts of a batch and of their negative prompts."""

    prompt: list[Tensor]  # [n, D] each
    negative: list[Tensor]  # [n, D] each, as many as prompts


class TextEncoder:
    """Prompts to features.

    Args:
        tokenizer: from transformers; the released models use CodeGen's.
        model: a ``PhiModel`` or another causal model with ``last_hidden_state``.
        max_length: longer prompts are cut after this many tokens.
    """

    def __init__(self, tokenizer: Any, model: nn.Module, max_length: int = MAX_LENGTH) -> None:
        self.tokenizer = tokenizer
        self.model: Any = model
        self.max_length = max_length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features ``[n, D]`` of each prompt, in the dtype and on the device of the model."""
        return [self._encode_one(prompt) for prompt in prompts]

    def encode_pairs(
        self, prompts: Sequence[str], negative_prompts: str | Sequence[str] = ""
    ) -> TextFeatures:
        """Features for guidance; a single negative prompt is used for all prompts.

        Raises:
            ValueError: several negative prompts, but not as many as prompts.
        """
        if isinstance(negative_prompts, str):
            negative_prompts = [negative_prompts]
        negative = _for_each(self.encode(negative_prompts), len(prompts))
        return TextFeatures(self.encode(prompts), negative)

    def _encode_one(self, prompt: str) -> Tensor:
        ids = self.tokenizer(prompt, max_length=self.max_length, truncation=True)["input_ids"]
        if not ids:
            weight = next(self.model.parameters())
            return weight.new_empty(0, self.model.config.hidden_size)
        tokens = torch.tensor([ids], device=self.model.device)
        return self.model(input_ids=tokens, use_cache=False).last_hidden_state[0]


def load_text_encoder(
    folder: str | Path, dtype: torch.dtype | None = None, max_length: int = MAX_LENGTH
) -> TextEncoder:
    """The encoder in the folders ``tokenizer`` and ``text_encoder`` of a released model.

    Args:
        dtype: of the weights; default that of the files.

    Raises:
        ValueError: missing files; the errors of `load_exactly`.
    """
    from transformers import CodeGenTokenizer

    folder = Path(folder)
    path = next((p for name in FILES if (p := folder / "text_encoder" / name).exists()), None)
    if path is None:
        raise ValueError(
            f"folder: expected {' or '.join(FILES)} in {folder / 'text_encoder'}, found none"
        )
    model = load_phi(read_config(folder / "text_encoder"), read_state_dict(path), dtype)
    tokenizer = read_tokenizer(CodeGenTokenizer, folder / "tokenizer")
    return TextEncoder(tokenizer, model, max_length)


def load_phi(
    config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> nn.Module:
    """A ``PhiModel`` with the weights of a checkpoint, whose keys may begin with ``model.``.

    The head that predicts tokens is left out. Errors: `load_exactly`.
    """
    from transformers import PhiConfig, PhiModel

    with torch.device("meta"):
        model = PhiModel(PhiConfig.from_dict(dict(config)))
    state = {key: x.to(dtype) for key, x in state.items()} if dtype is not None else state
    load_exactly(model, state, prefix="model.", skip=("lm_head.",))
    # its table is not in checkpoints, and is fp32 in every dtype
    model.rotary_emb = type(model.rotary_emb)(model.config)
    return model.eval()


def read_features(
    tensors: Mapping[str, Tensor], width: int, max_length: int = MAX_LENGTH
) -> TextFeatures:
    """Features from a file of `write_features`.

    Args:
        tensors: ``prompt_embeds.{i}`` ``[n, D]`` for the samples i = 0, 1, ...;
            ``negative_prompt_embeds.{i}``: none (the empty prompt), one for all samples, or one
            for each.
        width: `text_token_dim` of the transformer.
        max_length: `text_token_len` of the transformer.

    Raises:
        ValueError: other keys, shapes or counts.
    """
    prompt, negative = (_numbered(tensors, key) for key in KEYS.values())
    if not prompt or len(prompt) + len(negative) != len(tensors):
        expected = " and ".join(f"{key}.0, {key}.1, ..." for key in KEYS.values())
        raise ValueError(f"embeddings: expected {expected}, got {', '.join(sorted(tensors))}")
    for key, x in tensors.items():
        if x.ndim != 2 or x.shape[0] > max_length or x.shape[1] != width:
            shape = f"[at most {max_length}, {width}]"
            raise ValueError(f"{key}: expected {shape}, got {list(x.shape)}")
    negative = negative or [prompt[0].new_empty(0, width)]
    return TextFeatures(prompt, _for_each(negative, len(prompt)))


def write_features(path: str | Path, features: TextFeatures) -> None:
    """Writes a safetensors file for `read_features`. Raises ValueError if ``path`` exists."""
    write_state_dict(
        path,
        {
            f"{KEYS[name]}.{i}": x.clone()  # samples may share a tensor; safetensors refuses that
            for name, rows in features._asdict().items()
            for i, x in enumerate(rows)
        },
    )


def _numbered(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    found: list[Tensor] = []
    while (key := f"{name}.{len(found)}") in tensors:
        found.append(tensors[key])
    return found


def _for_each(negative: list[Tensor], n: int) -> list[Tensor]:
    if len(negative) not in (1, n):
        raise ValueError(f"negative prompts: expected 1 or {n}, got {len(negative)}")
    return negative * n if len(negative) == 1 else negative
