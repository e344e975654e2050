"""The temporal pyramid: which finished frames a new one sees, at which resolution.

Video is made in *units*: unit 0 is the first latent frame, every later one ``frames_per_unit``
frames. The unit j steps back (j = 1: the newest) enters stage s at pyramid level
``max(s - (j - 1), 0)``: the older, the smaller. Levels count from the lowest resolution, 0.
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
    """The units of a video of ``n_frames`` latent frames; ValueError unless they fill the last."""
    if n_frames < 1 or (n_frames - 1) % frames_per_unit:
        raise ValueError(
            f"frames: expected 1 and a multiple of {frames_per_unit} more, got {n_frames}"
        )
    return 1 + (n_frames - 1) // frames_per_unit


def history_layout(unit: int, stage: int, frames_per_unit: int = 1) -> list[HistoryClip]:
    """The clips before ``unit`` at ``stage``, oldest first.

    The frames at level 0 are one clip, but for the newest unit, which is always its own.
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
    """How many of the oldest frames entered this stage of the unit before as they enter it here.

    They are at level 0 in both: all but the ``stage + 1`` newest units of history.
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
    """How many units each stage trains on in a step, the last being the one that is made.

    The highest resolution goes through all lengths as steps and ranks go by; the others take what
    it leaves, so that a step has a long sequence of small frames and a short one of large ones.

    Args:
        max_frames: latent frames of the longest video.
        step: counts from 1.
        sync_group: how many neighbouring ranks differ in length.
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
