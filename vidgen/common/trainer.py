"""The training loop: AdamW on a model's objective, in one process or several.

Weights are fp32, and the objective runs in autocast. Each sample of a run has its own random
numbers, from the seed and its position in the run. So results do not depend on how a batch is
divided among processes, and a resumed run continues as if it had not stopped.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import (
    load_exactly,
    publish,
    read_folder,
    read_state_dict,
    write_state_dict,
    written_whole,
)
from .progress import SILENT, Bars, Silent
from .samples import Sample, Samples, seed_of

WEIGHTS, CONFIG, OPTIMIZER = "diffusion_pytorch_model.safetensors", "config.json", "optimizer.pt"
LOG = "losses.jsonl"


class Batch(NamedTuple):
    """The samples of one process in one step."""

    samples: list[Sample]  # on the device; floating-point tensors in fp32
    positions: range  # of the samples in the run
    generators: list[torch.Generator]  # on the device, one per sample
    shared: torch.Generator  # on the device, with the same seed in all processes

    def dropped(self, share: float) -> Tensor:
        """Bool ``[B]``: which samples train without their text; on average ``share`` of them."""
        draws = [torch.rand((), generator=g, device=g.device) for g in self.generators]
        return torch.stack(draws) < share


class Objective(nn.Module):
    """A model and its loss. Training minimises the mean of `forward` over the processes.

    Args:
        config: is written to config.json of checkpoints.
        dtype: of autocast; the weights are fp32.
        prompt_dropout: share of samples that are trained without their text.

    Attributes:
        same: names of tensors that need the same shape in all samples of a batch.
    """

    same: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        prompt_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.model: Any = model.float().train()
        self.config, self.dtype, self.prompt_dropout = config, dtype, prompt_dropout

    def read(self, tensors: Sample) -> Sample:
        """A sample from the tensors of a file. Raises ValueError if they do not fit."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """The loss: the mean over the samples of the batch."""
        raise NotImplementedError

    def autocast(self) -> AbstractContextManager[Any]:
        """The context to run the model in; noise and targets are computed outside, in fp32."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)


class Recipe(NamedTuple):
    """Settings of the optimizer."""

    learning_rate: float
    batch_size: int  # samples per process and step
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0  # of matrices and kernels, not of biases, norms and gates
    max_norm: float = 0.0  # gradients are scaled down to this total norm; 0: never
    warmup_steps: int = 0  # in which the learning rate grows linearly from 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)


class Schedule(NamedTuple):
    steps: int  # of the whole run
    save_every: int
    seed: int


class Process(NamedTuple):
    """One of the processes that train together."""

    device: torch.device
    rank: int = 0
    count: int = 1


class Trainer:
    """Trains an objective, and writes losses and checkpoints to a folder.

    ``losses.jsonl`` has a line for each step; steps that are repeated after an interruption occur
    twice. ``step_000100`` and so on are checkpoints in the layout of diffusers, with the state of
    the optimizer.
    """

    def __init__(
        self,
        objective: Objective,
        samples: Samples,
        recipe: Recipe,
        schedule: Schedule,
        output: Path,
        process: Process,
    ) -> None:
        self.objective, self.samples, self.output = objective.to(process.device), samples, output
        self.recipe, self.schedule, self.process = recipe, schedule, process
        self.optimizer = recipe.optimizer(objective)
        self.step = 0  # done so far
        self._run: nn.Module = objective
        if process.count > 1:
            device = process.device
            self._run = DistributedDataParallel(
                objective, device_ids=[device] if device.type == "cuda" else None
            )

    def train(self, progress: Bars | Silent = SILENT) -> None:
        """Runs the remaining steps. Raises ValueError for a loss or gradient that is not finite."""
        schedule = self.schedule
        for step in progress.track(range(self.step, schedule.steps), "training"):
            line = self._train_step(step)
            self.step = step + 1
            self._log({"step": self.step, **line})
            progress.note(f"loss {line['loss']:.4f}")
            if self.step % schedule.save_every == 0 or self.step == schedule.steps:
                self._save()

    def resume(self) -> None:
        """Loads the last checkpoint in the folder, to continue from it.

        Raises:
            ValueError: no checkpoint, a checkpoint of another run, or no steps left.
        """
        folder = last_checkpoint(self.output)
        state: dict[str, Any] = read_state_dict(folder / OPTIMIZER)
        for name, value in self._identity.items():
            if state.get(name) != value:
                expected = f"expected {name} {state.get(name)} as before"
                raise ValueError(f"resume: {expected}, got {value}")
        if state["step"] >= self.schedule.steps:
            raise ValueError(
                f"steps: expected more than the {state['step']} done, got {self.schedule.steps}"
            )
        load_exactly(self.objective.model, read_folder(folder)[1])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    @property
    def _identity(self) -> dict[str, int]:
        """What has to be equal in a resumed run: it decides on samples and random numbers."""
        return {
            "seed": self.schedule.seed,
            "samples": len(self.samples),
            "batch size": self.recipe.batch_size * self.process.count,
        }

    def _train_step(self, step: int) -> dict[str, float]:
        rate = self.recipe.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._run(self._batch(step))
        mean = loss.detach()
        if self.process.count > 1:
            mean = mean.clone()
            dist.all_reduce(mean)
            mean /= self.process.count
        _check_finite("loss", mean, step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(
            self.objective.parameters(), self.recipe.max_norm or math.inf
        )
        _check_finite("norm of the gradients", norm, step)
        self.optimizer.step()
        return {"loss": mean.item(), "learning_rate": rate, "gradient_norm": norm.item()}

    def _batch(self, step: int) -> Batch:
        """The samples of this process; a step has one block of samples for each process."""
        process, size, device = self.process, self.recipe.batch_size, self.process.device
        first = (step * process.count + process.rank) * size
        positions = range(first, first + size)
        samples = [_to(self.samples.at(position), device) for position in positions]
        seed = self.schedule.seed
        generators = [
            torch.Generator(device).manual_seed(seed_of(seed, "sample", position))
            for position in positions
        ]
        shared = torch.Generator(device).manual_seed(seed_of(seed, "step", step))
        return Batch(samples, positions, generators, shared)

    def _log(self, line: Mapping[str, float]) -> None:
        if self.process.rank == 0:
            with (self.output / LOG).open("a") as log:
                log.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        if self.process.rank == 0:
            state = {
                "step": self.step,
                **self._identity,
                "optimizer": self.optimizer.state_dict(),
            }
            folder = self.output / f"step_{self.step:06d}"
            write_checkpoint(folder, self.objective, state)
        if self.process.count > 1:
            dist.barrier()


def write_checkpoint(folder: Path, objective: Objective, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all. Raises ValueError if ``folder`` exists."""
    if folder.exists():
        raise ValueError(f"output: expected a new folder, {folder} exists")
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was stopped while writing
    unfinished.mkdir()
    try:
        with written_whole(unfinished / CONFIG) as path:
            path.write_text(json.dumps(objective.config, indent=2) + "\n")
        write_state_dict(unfinished / WEIGHTS, objective.model.state_dict())
        with written_whole(unfinished / OPTIMIZER) as path:
            torch.save(dict(state), path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    publish(unfinished, folder)


def last_checkpoint(output: Path) -> Path:
    """The checkpoint with the most steps. Raises ValueError if there is none."""
    found = [
        (int(path.name[5:]), path) for path in output.glob("step_*") if path.name[5:].isdigit()
    ]
    if not found:
        raise ValueError(f"resume: expected step_* in {output}, found none")
    return max(found)[1]


def _check_finite(name: str, x: Tensor, step: int) -> None:
    """Raises ValueError, in all processes and before weights change, if ``x`` is not finite."""
    if not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite number at step {step + 1}, got {x:g}")


def _to(sample: Sample, device: torch.device) -> Sample:
    moved = {key: x.to(device) for key, x in sample.items()}
    return {key: x.float() if x.is_floating_point() else x for key, x in moved.items()}
