"""Connects Pyramid Flow's loss to `vidgen train`: how samples are read and made into columns.

A sample is a safetensors file with ``latents`` [C, T, h, w], normalised (`normalize_latents`), and
T = 1 for an image; and with ``prompt.text``, ``prompt.text_mask`` and ``prompt.pooled`` of one
prompt, as in the files of features for `vidgen generate`. It may also have the same three of
``negative``: the features of the empty prompt, used where a prompt is dropped.

Each sample is a column with one row, so that samples of any sizes may be mixed. The sample at
position p of the run takes entry p of `TrainingConfig.stages`, modulo their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vidgen.common.samples import Sample, take_latents
from vidgen.common.trainer import Batch, Objective

from ..model.config import PATCH
from ..model.history import training_units
from ..model.transformer import PyramidTransformer
from ..sampling.scheduler import PyramidFlowScheduler
from ..text import PARTS, TextFeatures, read_features
from .loss import (
    TrainingColumn,
    TrainingConfig,
    draw_column,
    drop_prompts,
    training_column,
    training_step,
)


class PyramidFlowObjective(Objective):
    same = ("prompt.text",)

    def __init__(
        self,
        model: PyramidTransformer,
        raw: Mapping[str, Any],
        columns: TrainingConfig,
        **options: Any,
    ) -> None:
        super().__init__(model, raw, **options)
        self.columns, self.scheduler = columns, PyramidFlowScheduler(columns.n_stages)

    def read(self, tensors: Sample) -> Sample:
        config = self.model.config
        latents, others = take_latents(tensors, (config.latent_channels, None, None, None))
        height, width = latents.shape[2:]
        side = PATCH * 2 ** (self.columns.n_stages - 1)
        if height % side or width % side:
            expected = f"height and width in multiples of {side}"
            raise ValueError(f"latents: expected {expected}, got {list(latents.shape)}")
        if read_features(others, config).negative is None and self.prompt_dropout:
            raise ValueError("negative: expected an empty prompt, or no prompt dropout, got none")
        for name, x in others.items():
            expected = [1, *others[f"prompt.{name.partition('.')[2]}"].shape[1:]]
            if list(x.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {list(x.shape)}")
        return {"latents": latents, **others}

    def forward(self, batch: Batch) -> Tensor:
        rows = zip(batch.samples, batch.positions, batch.generators, strict=True)
        columns = [self._column(x["latents"][None], place, g) for x, place, g in rows]
        text = _features("prompt", batch.samples)
        if self.prompt_dropout:
            drop = batch.dropped(self.prompt_dropout)
            text = drop_prompts(text, _features("negative", batch.samples), drop)
        full = self.columns.full_sequence
        with self.autocast():
            return training_step(self.model, columns, text, full_sequence=full).loss

    def _column(self, latents: Tensor, position: int, generator: torch.Generator) -> TrainingColumn:
        """The column of one sample.

        Its length comes from `training_units`, where a step is one round through the stages. In
        the released code each process has one round in a step.
        """
        config = self.columns
        step, column = divmod(position, len(config.stages))
        stage, n_units = config.stages[column], 0
        if not config.full_sequence:
            units = training_units(
                config.n_stages,
                latents.shape[2],
                step=step + 1,
                sync_group=1,
                frames_per_unit=config.frames_per_unit,
            )
            n_units = units[stage]
        drawn = draw_column(latents, stage, n_units, config, generator)
        return training_column(
            latents, drawn, stage, n_units, config, self.scheduler, self.model.ops
        )


def _features(name: str, samples: list[Sample]) -> TextFeatures:
    return TextFeatures(*(torch.cat([x[f"{name}.{part}"] for x in samples]) for part in PARTS))
