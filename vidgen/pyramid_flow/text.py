"""Text encoders of the released checkpoints, and files of features that are computed beforehand.

T5 gives features of every token, including padding, and a mask of the tokens that are text. CLIP
gives one pooled vector. `pipeline` encodes prompts; the sampler and training take `TextFeatures`.
Folders of a checkpoint, in the layout of transformers:

    miniFLUX    tokenizer, text_encoder        CLIP-L, pooled [B, 768]
                tokenizer_2, text_encoder_2    T5-XXL, text [B, 128, 4096]
    SD3 type    tokenizer, text_encoder        CLIP-L and CLIP-G, each with its projection,
                tokenizer_2, text_encoder_2      pooled [B, 768 + 1280]
                tokenizer_3, text_encoder_3    T5-XXL, text [B, 128, 4096]

A file of features is a safetensors file with ``prompt.text``, ``prompt.text_mask``,
``prompt.pooled`` and, for guidance, the same three of ``negative``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidgen.common.checkpoint import write_state_dict
from vidgen.common.text_encoders import read_model, read_tokenizer

from .model.config import FluxConfig, MMDiTConfig

TEXT_LENGTH = 128  # tokens of T5; longer prompts are cut

# The released code appends this to every prompt, and has this default negative prompt.
PROMPT_SUFFIX = ", hyper quality, Ultra HD, 8K"
NEGATIVE_PROMPT = (
    "cartoon style, worst quality, low quality, blurry, absolute black, absolute white, low res, "
    "extra limbs, extra digits, misplaced objects, mutated anatomy, monochrome, horror"
)

PARTS = ("text", "text_mask", "pooled")  # of a prompt in a file, in the order of `TextFeatures`


class TextFeatures(NamedTuple):
    """What the text encoders give for B prompts, and the transformer takes."""

    features: Tensor  # [B, S, joint_attention_dim]
    mask: Tensor | None  # [B, S], zero for the padding at the end
    pooled: Tensor  # [B, pooled_projection_dim]


class Prompts(NamedTuple):
    """The prompts of videos, and the negative prompts for guidance."""

    prompt: TextFeatures
    negative: TextFeatures | None


class TextEncoder(nn.Module):
    """T5, and one CLIP model or two whose pooled features are concatenated.

    Args:
        t5, clips: models of transformers: `T5EncoderModel`, and `CLIPTextModel` or
            `CLIPTextModelWithProjection`, whose projection is used.
        t5_tokenizer, clip_tokenizers: their tokenizers.
    """

    def __init__(
        self, t5: nn.Module, t5_tokenizer: Any, clips: Sequence[nn.Module], clip_tokenizers: Any
    ) -> None:
        super().__init__()
        self.t5, self.clips = t5, nn.ModuleList(clips)
        self.t5_tokenizer, self.clip_tokenizers = t5_tokenizer, list(clip_tokenizers)

    def forward(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of B prompts, in the dtype of the encoders and on their device."""
        # As in the released code, CLIP-G gets as many tokens as CLIP-L reads.
        n_clip = self.clip_tokenizers[0].model_max_length
        pooled = [
            _pooled(clip(_tokens(tokenizer, prompts, n_clip, clip)[0]))
            for clip, tokenizer in zip(self.clips, self.clip_tokenizers, strict=True)
        ]
        tokens, mask = _tokens(self.t5_tokenizer, prompts, TEXT_LENGTH, self.t5)
        features = self.t5(tokens, attention_mask=mask).last_hidden_state
        return TextFeatures(features, mask, torch.cat(pooled, dim=-1))


def _tokens(
    tokenizer: Any, prompts: Sequence[str], length: int, model: nn.Module
) -> tuple[Tensor, Tensor]:
    """Tokens and mask ``[B, length]``, padded or cut, on the model's device."""
    found = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    device = next(model.parameters()).device
    return found.input_ids.to(device), found.attention_mask.to(device)


def _pooled(output: Any) -> Tensor:
    return output.text_embeds if "text_embeds" in output else output.pooler_output


def load_text_encoder(folder: str | Path, dtype: torch.dtype) -> TextEncoder:
    """The text encoders in the folder of a checkpoint. Only safetensors are read.

    Raises:
        ValueError: a folder or weights missing.
    """
    import transformers

    folder = Path(folder)
    two_clips = (folder / "text_encoder_3").is_dir()
    clip = transformers.CLIPTextModelWithProjection if two_clips else transformers.CLIPTextModel
    *clip_suffixes, t5_suffix = ("", "_2", "_3") if two_clips else ("", "_2")
    return TextEncoder(
        read_model(transformers.T5EncoderModel, folder / f"text_encoder{t5_suffix}", dtype),
        read_tokenizer(transformers.T5TokenizerFast, folder / f"tokenizer{t5_suffix}"),  # type: ignore[attr-defined]
        [read_model(clip, folder / f"text_encoder{suffix}", dtype) for suffix in clip_suffixes],
        [
            read_tokenizer(transformers.CLIPTokenizer, folder / f"tokenizer{suffix}")
            for suffix in clip_suffixes
        ],
    )


def write_features(path: str | Path, prompts: Prompts) -> None:
    """Writes a new file of features. Raises ValueError if ``path`` exists."""
    tensors = {}
    for name, found in prompts._asdict().items():
        if found is not None:
            mask = torch.ones(found.features.shape[:2]) if found.mask is None else found.mask
            parts = zip(PARTS, (found.features, mask.long(), found.pooled), strict=True)
            tensors |= {f"{name}.{part}": x for part, x in parts}
    write_state_dict(path, tensors)


def read_features(tensors: Mapping[str, Tensor], config: FluxConfig | MMDiTConfig) -> Prompts:
    """The prompts in a file of features, checked against a transformer's sizes.

    Raises:
        ValueError: tensors missing or left over, or of another shape.
    """
    prompt, negative = ([f"{name}.{part}" for part in PARTS] for name in Prompts._fields)
    if tensors.keys() not in (set(prompt), {*prompt, *negative}):
        raise ValueError(
            f"embeddings: expected {', '.join(prompt)}, and perhaps the same of negative, "
            f"got {', '.join(sorted(tensors)) or 'nothing'}"
        )
    has_negative = negative[0] in tensors
    return Prompts(
        _features(prompt, tensors, config),
        _features(negative, tensors, config) if has_negative else None,
    )


def _features(
    names: Sequence[str], tensors: Mapping[str, Tensor], config: FluxConfig | MMDiTConfig
) -> TextFeatures:
    text, mask, pooled = (tensors[name] for name in names)
    n_rows, length = (*text.shape, 0, 0)[:2]
    for name, x, shape in (
        (names[0], text, [n_rows, length, config.joint_attention_dim]),
        (names[1], mask, [n_rows, length]),
        (names[2], pooled, [n_rows, config.pooled_projection_dim]),
    ):
        if list(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")
    return TextFeatures(text, mask, pooled)
