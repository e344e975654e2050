"""Training data: a folder of safetensors files with one video or image in each.

A file holds ``latents`` of the VAE, normalised as the model expects them, and the text features of
one prompt, named as in the files for `vidgen generate --embeddings`. Both are computed beforehand;
`checkpoint.write_state_dict` writes such files. ``vidgen/<model>/training/objective.py`` lists the
tensors that a model needs.

The order of samples depends on the seed only. The n-th sample of a run, counted over all steps and
processes, is the same for any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .finite import require_finite
from .progress import SILENT, Bars, Silent

Sample = dict[str, Tensor]


def seed_of(*parts: int | str) -> int:
    """A seed from several parts; similar parts give unrelated seeds. 32 bits, as a CPU reads."""
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


class Samples:
    """The samples of a folder, in a new random order in every epoch.

    Args:
        read: makes a sample of the tensors of a file; raises ValueError if they do not fit. At the
            start it is called for every file with tensors on the meta device, so that a bad file
            is found before training.
        same: names of tensors whose shape has to be the same in all samples.

    Raises:
        ValueError: a missing or empty folder, or a file that does not fit, with its name.
    """

    def __init__(
        self,
        folder: Path,
        read: Callable[[Sample], Sample],
        *,
        same: Sequence[str] = (),
        seed: int = 0,
        progress: Bars | Silent = SILENT,
    ) -> None:
        if not folder.is_dir():
            raise ValueError(f"data: expected a folder, {folder} is none")
        self.paths = sorted(folder.glob("*.safetensors"))
        if not self.paths:
            raise ValueError(f"data: expected *.safetensors in {folder}, found none")
        self._read, self.seed = read, seed
        self._epoch, self._order = -1, torch.empty(0)
        self._check(progress.track(self.paths, "samples"), same)

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, position: int) -> Sample:
        """The sample at a position of the run (counted over epochs), on the CPU."""
        epoch, i = divmod(position, len(self))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self), generator=generator)
        return self._load(self.paths[int(self._order[i])])

    def _load(self, path: Path, *, only_shapes: bool = False) -> Sample:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                keys = file.keys()
                if only_shapes:
                    shapes = {key: file.get_slice(key).get_shape() for key in keys}
                    tensors = {key: torch.empty(x, device="meta") for key, x in shapes.items()}
                else:
                    tensors = {key: file.get_tensor(key) for key in keys}
                    require_finite(tensors)
            return self._read(tensors)
        except (SafetensorError, ValueError) as problem:
            raise ValueError(f"{path}: {problem}") from problem

    def _check(self, paths: Iterable[Path], same: Sequence[str]) -> None:
        first: Sample | None = None
        for path in paths:
            sample = self._load(path, only_shapes=True)
            first = sample if first is None else first
            for name in same:
                expected, shape = list(first[name].shape), list(sample[name].shape)
                if shape != expected:
                    raise ValueError(
                        f"{path}: {name}: expected shape {expected} as in {self.paths[0].name}, "
                        f"got {shape}"
                    )


def take_latents(tensors: Sample, expected: Sequence[int | None]) -> tuple[Tensor, Sample]:
    """``latents`` and the other tensors of a file; None in ``expected`` means any size.

    Raises:
        ValueError: missing latents, or another shape.
    """
    others = dict(tensors)
    latents = others.pop("latents", None)
    if latents is None:
        raise ValueError(f"latents: expected a tensor, got {', '.join(sorted(others)) or 'none'}")
    fits = latents.ndim == len(expected) and all(
        b in (None, a) for a, b in zip(latents.shape, expected, strict=True)
    )
    if not fits or not latents.numel():
        shape = ", ".join("any" if n is None else str(n) for n in expected)
        raise ValueError(f"latents: expected shape [{shape}], got {list(latents.shape)}")
    return latents, others
