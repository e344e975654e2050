"""The training loop: AdamW on a model's objective, in one process or several.

Weights are kept in fp32, the objective runs in autocast. Every sample of the run has random numbers
of its own, from the seed and its position, so that results do not depend on how a batch is shared
among processes, and a run that is resumed goes on as if it had not stopped.
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
    """The samples that a process has in a step."""

    samples: list[Sample]  # on the device, in fp32 where they are not integers
    positions: range  # of the samples in the run
    generators: list[torch.Generator]  # on the device, one for each sample
    shared: torch.Generator  # on the device, with the same numbers in all processes

    def dropped(self, share: float) -> Tensor:
        """Bool ``[B]``: the samples that are trained without their text, ``share`` of all."""
        draws = [torch.rand((), generator=g, device=g.device) for g in self.generators]
        return torch.stack(draws) < share


class Objective(nn.Module):
    """A model and its loss. The mean over processes of what `forward` gives is minimised.

    Args:
        config: what config.json of a checkpoint will hold.
        dtype: of the model's matrix products; its weights are fp32.
        prompt_dropout: share of samples that are trained without their text.

    Attributes:
        same: names of tensors that a batch has in one shape.
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
        """The sample in the tensors of a file. Raises ValueError where they do not fit."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """The loss, the mean over the samples of the batch."""
        raise NotImplementedError

    def autocast(self) -> AbstractContextManager[Any]:
        """For the model; noise and targets are made outside, in fp32."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)


class Recipe(NamedTuple):
    """How a model's weights are changed."""

    learning_rate: float
    batch_size: int  # samples of a process in a step
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0  # of matrices and kernels, not of biases, norms and gates
    max_norm: float = 0.0  # of all gradients together; 0: any
    warmup_steps: int = 0  # over which the learning rate grows from 0

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
    """Trains an objective and writes what comes of it to a folder.

    The folder gets ``losses.jsonl``, a line for each step, and ``step_000100`` and so on: a
    checkpoint in the layout of diffusers, with the state of the optimizer. A step that was run
    again after an interruption is in the log again.
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
        """All steps that are left. Raises ValueError for numbers that are not finite."""
        schedule = self.schedule
        for step in progress.track(range(self.step, schedule.steps), "training"):
            line = self._train_step(step)
            self.step = step + 1
            self._log({"step": self.step, **line})
            progress.note(f"loss {line['loss']:.4f}")
            if self.step % schedule.save_every == 0 or self.step == schedule.steps:
                self._save()

    def resume(self) -> None:
        """Goes on from the last checkpoint in the folder.

        Raises:
            ValueError: no checkpoint, one of another run, or no steps left.
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
        """What has to be the same for the samples and their random numbers to be the same."""
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
        """The processes' samples follow one another, in blocks."""
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
    """Complete or not there. Raises ValueError where ``folder`` exists."""
    if folder.exists():
        raise ValueError(f"output: expected a new folder, {folder} exists")
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was stopped while it wrote
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
    """The checkpoint of the most steps. Raises ValueError where there is none."""
    found = [
        (int(path.name[5:]), path) for path in output.glob("step_*") if path.name[5:].isdigit()
    ]
    if not found:
        raise ValueError(f"resume: expected step_* in {output}, found none")
    return max(found)[1]


def _check_finite(name: str, x: Tensor, step: int) -> None:
    """The same in all processes, before anything is changed."""
    if not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite number at step {step + 1}, got {x:g}")


def _to(sample: Sample, device: torch.device) -> Sample:
    moved = {key: x.to(device) for key, x in sample.items()}
    return {key: x.float() if x.is_floating_point() else x for key, x in moved.items()}
