"""The temporal pyramid: which finished frames a new one sees, at which resolution.

A video is made in *units*. Unit 0 is the first latent frame, every later unit has
``frames_per_unit`` frames. While stage s of a unit is made, the unit j before it (j = 1 is the
newest) enters at pyramid level ``max(s - (j - 1), 0)``, so that older frames are smaller. Level 0
is the lowest resolution.

Sampler, cache and training all take the layout of the history from here.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple


class HistoryClip(NamedTuple):
    level: int
    frames: range  # latent frames


def unit_frames(unit: int, frames_per_unit: int = 1) -> range:
    """The latent frames of a unit."""
    stop = 1 + unit * frames_per_unit
    return range(stop - frames_per_unit if unit else 0, stop)


def count_units(n_frames: int, frames_per_unit: int = 1) -> int:
    """The number of units in a video of ``n_frames`` latent frames.

    Raises:
        ValueError: frames that are no whole number of units.
    """
    if n_frames < 1 or (n_frames - 1) % frames_per_unit:
        raise ValueError(
            f"frames: expected 1 and a multiple of {frames_per_unit} more, got {n_frames}"
        )
    return 1 + (n_frames - 1) // frames_per_unit


def history_layout(unit: int, stage: int, frames_per_unit: int = 1) -> list[HistoryClip]:
    """The clips before ``unit`` at ``stage``, oldest first.

    Neighbours of one level are one clip, except for the newest unit, which is a clip of its own.
    """
    clips = [
        HistoryClip(max(stage - back + 1, 0), unit_frames(unit - back, frames_per_unit))
        for back in range(unit, 0, -1)
    ]
    older, newest = clips[:-1], clips[-1:]
    joined = [
        HistoryClip(level, range(run[0].frames.start, run[-1].frames.stop))
        for level, run in ((level, list(run)) for level, run in groupby(older, lambda c: c.level))
    ]
    return joined + newest


def settled_frames(unit: int, stage: int, frames_per_unit: int = 1) -> int:
    """How many of the oldest frames have the same resolution as in this stage of the unit before.

    They are at level 0 in both. All units of history are, except the ``stage + 1`` newest.
    """
    newest = unit - stage - 2
    return unit_frames(newest, frames_per_unit).stop if newest >= 0 else 0


def training_units(
    n_stages: int,
    max_frames: int,
    *,
    step: int,
    rank: int = 0,
    sync_group: int = 8,
    frames_per_unit: int = 1,
) -> list[int]:
    """How many units each stage trains on in a step, including the last, which is being made.

    Over steps and ranks, the highest resolution goes through all lengths. The other stages get
    ``n_units + 1`` minus that length, so that a step has long sequences of small frames and short
    ones of large frames.

    Args:
        max_frames: latent frames of the longest video.
        step: counts from 1.
        sync_group: how many neighbouring ranks have different lengths.

    Raises:
        ValueError: a step below 1, a group of more ranks than there are units.
    """
    n_units = 1 + (max_frames - 1) // frames_per_unit
    n_groups = n_units // sync_group
    if step < 1 or n_groups < 1:
        raise ValueError(
            f"step, sync_group: expected a step of at least 1 and at most {n_units} ranks in a "
            f"group, got {step} and {sync_group}"
        )
    high = rank % sync_group + 1 + step % n_groups * sync_group
    return [max(1 + n_units - high, 1)] * (n_stages - 1) + [high]
