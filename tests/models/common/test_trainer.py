"""The training loop on one weight: order of samples, recipe, checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vidgen.common.samples import Samples, seed_of
from vidgen.common.trainer import (
    Batch,
    Objective,
    Process,
    Recipe,
    Schedule,
    Trainer,
    write_checkpoint,
)

pytestmark = pytest.mark.portable_only


def test_samples_are_shuffled_anew_in_every_epoch(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(7):
        save_file({"x": torch.tensor([i])}, folder / f"{i}.safetensors")
    samples, others = (Samples(folder, dict, seed=seed) for seed in (0, 1))
    epochs = [[samples.at(7 * e + i)["x"].item() for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == [samples.at(i)["x"].item() for i in range(7)]
    assert epochs[0] != [others.at(i)["x"].item() for i in range(7)]
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900


class Line(Objective):
    """One weight w and a bias that nothing reads; the loss is w times the samples' mean."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), {"size": 1})
        with torch.no_grad():
            self.model.weight.fill_(2.0)

    def read(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def forward(self, batch: Batch) -> Tensor:
        return (self.model.weight * torch.stack([x["x"] for x in batch.samples])).mean()


class Steep(Line):
    """The loss is 0, its gradient is no number."""

    def forward(self, batch: Batch) -> Tensor:
        return (self.model.weight - 2).abs().sqrt().mean()


def line_trainer(
    folder: Path, x: float, steps: int = 3, objective: Objective | None = None, **recipe: Any
) -> Trainer:
    (folder / "data").mkdir(exist_ok=True)
    save_file({"x": torch.tensor([x])}, folder / "data" / "0.safetensors")
    samples = Samples(folder / "data", dict)
    settings = Recipe(0.5, 1, **recipe)
    schedule, process = Schedule(steps, 2, 0), Process(torch.device("cpu"))
    return Trainer(objective or Line(), samples, settings, schedule, folder, process)


def test_the_recipe(tmp_path: Path) -> None:
    trainer = line_trainer(tmp_path, 3.0, warmup_steps=2, max_norm=0.5, weight_decay=0.1)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == [0.25, 0.5, 0.5]
    assert [line["gradient_norm"] for line in lines] == [3.0] * 3
    w, expected = 2.0, []
    for rate in (0.25, 0.5, 0.5):  # AdamW goes against the gradient's sign, whatever its size
        expected.append(3 * w)
        w -= rate * (0.1 * w + 1)
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000002", "step_000003"]
    decays = {
        group["weight_decay"]: len(group["params"]) for group in trainer.optimizer.param_groups
    }
    assert decays == {0.1: 1, 0.0: 1}


def test_numbers_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss: expected a finite number at step 1, got inf"):
        line_trainer(tmp_path, 3e38).train()  # times 2: beyond fp32
    steep = Steep()
    with pytest.raises(ValueError, match="gradients: expected a finite number at step 1, got nan"):
        line_trainer(tmp_path, 1.0, objective=steep).train()
    assert steep.model.weight.item() == 2.0
    with pytest.raises(ValueError, match=r"data/0\.safetensors: x: expected finite numbers"):
        line_trainer(tmp_path, float("nan")).train()
    assert not list(tmp_path.glob("step_*"))


def test_runs_that_cannot_go_on(tmp_path: Path) -> None:
    line_trainer(tmp_path, 1.0, steps=2).train()
    with pytest.raises(ValueError, match="steps: expected more than the 2 done, got 2"):
        line_trainer(tmp_path, 1.0, steps=2).resume()
    other = line_trainer(tmp_path, 1.0, steps=4)
    other.schedule = other.schedule._replace(seed=5)
    with pytest.raises(ValueError, match="resume: expected seed 0 as before, got 5"):
        other.resume()


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    objective, folder = Line(), tmp_path / "step_000001"
    with pytest.raises(AttributeError):
        write_checkpoint(folder, objective, {"optimizer": lambda: None})  # cannot be stored
    assert not list(tmp_path.iterdir())
    (tmp_path / ".step_000001").mkdir()  # what a run left that was killed
    write_checkpoint(folder, objective, {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    with pytest.raises(ValueError, match=r"output: expected a new folder, .* exists"):
        write_checkpoint(folder, objective, {"step": 1})
    assert json.loads((folder / "config.json").read_text()) == {"size": 1}
