"""Loads text encoders and tokenizers from folders of transformers; nothing is downloaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import SHOWN, read_config

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


def read_model(kind: Any, folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """A model of transformers, such as ``T5EncoderModel``, for inference; safetensors only.

    Raises:
        ValueError: a missing folder, or weights that are missing or of another size.
    """
    read_config(folder)
    try:
        model, report = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as problem:
        raise ValueError(f"text encoder: expected weights in {folder}: {problem}") from problem
    if missing := sorted(report["missing_keys"]):
        names = ", ".join(missing[:SHOWN])
        raise ValueError(f"text encoder: expected all weights in {folder}, got none for {names}")
    return model.eval().requires_grad_(False)


def read_tokenizer(kind: Any, folder: str | Path) -> Any:
    """A tokenizer of transformers.

    Raises:
        ValueError: no tokenizer in the folder.
        ModuleNotFoundError: a package that is needed to read T5's ``spiece.model`` is missing.
    """
    found = [name for name in TOKENIZER_FILES if (Path(folder) / name).exists()]
    if not found:
        raise ValueError(f"tokenizer: expected {' or '.join(TOKENIZER_FILES)} in {folder}")
    if found == ["spiece.model"]:
        # transformers needs both, but its error for a missing one names another package
        importlib.import_module("sentencepiece")
        importlib.import_module("google.protobuf")
    return kind.from_pretrained(folder, local_files_only=True)
