"""`vidgen train`: it learns, goes on where it stopped, and shares its work among processes."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.paths import ROOT
from vidgen.cli import main
from vidgen.commands.train import MODELS
from vidgen.common.checkpoint import read_state_dict
from vidgen.common.options import TrainRun
from vidgen.common.trainer import OPTIMIZER, WEIGHTS, Batch, Objective, write_checkpoint
from vidgen.nova.checks.random_weights import SMALL, fresh_model
from vidgen.nova.model.weights import load_pretrained as load_nova
from vidgen.nova.sampling.schedules import FlowMatching
from vidgen.nova.training.objective import NovaObjective
from vidgen.ops import EAGER, FUSED
from vidgen.pyramid_flow.model.weights import load_pretrained as load_pyramid_flow
from vidgen.repvideo.checks.random_weights import SMALL as SMALL_REPVIDEO
from vidgen.repvideo.model.transformer import CogVideoXTransformer
from vidgen.repvideo.model.weights import load_pretrained as load_repvideo
from vidgen.repvideo.training.objective import RepVideoObjective

pytestmark = pytest.mark.portable_only

LOAD = {"pyramid-flow": load_pyramid_flow, "repvideo": load_repvideo, "nova": load_nova}


def sample(model: str, seed: int) -> dict[str, Tensor]:
    """Of the sizes that models with random weights have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if model == "nova":
        return {"latents": normal(4, 2, 8, 12), "prompt_embeds.0": normal(3 + seed, 16)}
    if model == "repvideo":
        return {"latents": normal(3, 16, 6, 8), "prompt_embeds": normal(1, 8, 16)}
    tensors = {"latents": normal(4, 3, 8, 16)}
    for name, n_tokens in (("prompt", 9 + seed), ("negative", 1)):
        tensors[f"{name}.text"] = normal(1, 16, 32)
        tensors[f"{name}.text_mask"] = (torch.arange(16) < n_tokens).long()[None]
        tensors[f"{name}.pooled"] = normal(1, 16)
    return tensors


def write_data(folder: Path, model: str, n: int = 3) -> Path:
    folder.mkdir()
    for i in range(n):
        save_file(sample(model, i), folder / f"{i}.safetensors")
    return folder


def command(model: str, data: Path, output: Path, **options: object) -> list[str]:
    options = {"steps": 2, "learning-rate": 1e-3, "warmup-steps": 0, "save-every": 2, **options}
    given = [f"--{name}={x}" for name, x in options.items() if x is not True]
    flags = [f"--{name}" for name, x in options.items() if x is True]
    weights = [] if "checkpoint" in options else ["--random-weights"]
    return ["train", model, *weights, f"--data={data}", f"--output={output}", *given, *flags]


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def objective_of(model: str, ops=FUSED, argv: str = "", **options: Any) -> Objective:
    """With random weights; ``argv``: options of the model's own."""
    module, parser = importlib.import_module(MODELS[model]), argparse.ArgumentParser()
    module.add_arguments(parser.add_argument_group(model))
    run = TrainRun(None, ops, torch.float32, 0, False, 0.0)._replace(**options)
    return module.load(parser.parse_args(argv.split()), run)


def batch_of(objective: Objective, model: str, positions: range) -> Batch:
    """Of samples that differ, whose random numbers are their own."""
    samples = [objective.read(sample(model, i)) for i in positions]
    generators = [torch.Generator().manual_seed(100 + i) for i in positions]
    return Batch(samples, positions, generators, torch.Generator().manual_seed(1))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# ---- the command


@pytest.mark.parametrize("model", MODELS)
def test_a_sample_is_learnt(model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, output = write_data(tmp_path / "data", model, 1), tmp_path / "out"
    size = {"pyramid-flow": 4, "repvideo": 1, "nova": 2}[model]
    options: dict[str, object] = {"steps": 20, "save-every": 20, "learning-rate": 1e-2}
    options |= {"batch-size": size, "prompt-dropout": 0}
    assert main(command(model, data, output, **options)) == 0
    found = losses(output)
    assert len(found) == 20 and sum(found[-5:]) < 0.87 * sum(found[:5])
    assert capsys.readouterr().out == f"{output}\n"

    assert sorted(x.name for x in output.iterdir()) == ["losses.jsonl", "step_000020"]
    trained, fresh = LOAD[model](output / "step_000020"), objective_of(model).model
    assert trained.config == fresh.config
    states = trained.state_dict(), fresh.state_dict()
    same = {name for name, x in states[0].items() if torch.equal(x, states[1][name])}
    frozen = {name for name, p in fresh.named_parameters() if not p.requires_grad}
    assert frozen <= same
    assert len(same - frozen) < 0.1 * len(states[0])


@pytest.mark.parametrize("model", MODELS)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(model: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", model)
    for name, steps in (("whole", 4), ("parts", 2)):
        assert main(command(model, data, tmp_path / name, steps=steps)) == 0
    assert main(command(model, data, tmp_path / "parts", steps=4, resume=True)) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, parts = (
        load_file(tmp_path / name / "step_000004" / WEIGHTS) for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())
    folders = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert folders == ["losses.jsonl", "step_000002", "step_000004"]
    state = read_state_dict(tmp_path / "parts" / "step_000004" / OPTIMIZER)
    assert (state["step"], state["seed"], state["samples"]) == (4, 0, 3)


@pytest.mark.parametrize("model", MODELS)
def test_training_goes_on_from_a_checkpoint_in_the_released_layout(
    model: str, tmp_path: Path
) -> None:
    data, first = write_data(tmp_path / "data", model), tmp_path / "first"
    assert main(command(model, data, first, steps=1, ops="eager")) == 0
    folder, options = first / "step_000001", {}
    if model == "pyramid-flow":
        folder, options = first, {"variant": "step_000001"}
    elif model == "nova":
        (first / "step_000001").rename(first / "transformer")
        (first / "scheduler").mkdir()
        schedule = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
        (first / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
        folder = first
    second = tmp_path / "second"
    assert main(command(model, data, second, steps=1, checkpoint=folder, **options)) == 0
    again = command(model, data, tmp_path / "again", steps=1)
    assert main(again) == 0
    assert losses(second)[0] != losses(tmp_path / "again")[0] == pytest.approx(losses(first)[0])


@pytest.mark.parametrize("model", ["repvideo", "nova"])
def test_autocast_leaves_the_weights_in_fp32(model: str, tmp_path: Path) -> None:
    data, found = write_data(tmp_path / "data", model), {}
    for dtype in ("fp32", "bf16"):
        output = tmp_path / dtype
        assert main(command(model, data, output, steps=1, dtype=dtype)) == 0
        found[dtype] = losses(output)[0]
        weights = load_file(output / "step_000001" / WEIGHTS)
        assert {x.dtype for x in weights.values()} == {torch.float32}
    assert found["bf16"] != found["fp32"] == pytest.approx(found["bf16"], rel=1e-2)


def test_two_processes_do_the_work_of_one(tmp_path: Path) -> None:
    """Two ranks with a sample each against one with both: the moments of all gradients."""
    data = write_data(tmp_path / "data", "nova")
    options = {"device": "cpu", "learning-rate": 1e-4}
    argv = command("nova", data, tmp_path / "two", **{**options, "batch-size": 1})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(ROOT / "kernels"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launched = [*torchrun, "-m", "vidgen.cli", *argv]
    done = subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and done.stdout == f"{tmp_path / 'two'}\n"
    assert main(command("nova", data, tmp_path / "one", **{**options, "batch-size": 2})) == 0

    one, two = (tmp_path / name for name in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    states: list[Any] = [read_state_dict(x / "step_000002" / OPTIMIZER) for x in (one, two)]
    assert states[0]["batch size"] == states[1]["batch size"] == 2
    moments = [state["optimizer"]["state"] for state in states]
    assert len(moments[0]) == len(moments[1]) > 50
    for i, expected in moments[0].items():
        torch.testing.assert_close(
            moments[1][i]["exp_avg"], expected["exp_avg"], rtol=1e-3, atol=1e-6
        )
    weights = [load_file(x / "step_000002" / WEIGHTS) for x in (one, two)]
    for name, x in weights[0].items():
        torch.testing.assert_close(weights[1][name], x, rtol=0, atol=4e-4)  # twice two steps


# ---- requests that cannot be met

BAD_REQUESTS = {
    "no folder": ({"data": "nowhere"}, "data: expected a folder"),
    "no samples": ({"data": "."}, r"data: expected \*.safetensors in"),
    "output": ({"output": "data"}, "output: expected a new folder or --resume, .*data exists"),
    "not writable": ({"output": "/proc/a"}, "output: expected a name and a folder that can be"),
    "no parent": ({"output": "a/b"}, "output: expected an existing folder, got .*a"),
    "nothing to resume": ({"resume": True}, r"resume: expected step_\* in"),
    "checkpoint": ({"checkpoint": "nowhere"}, "checkpoint: expected a folder, nowhere is none"),
}


@pytest.mark.parametrize("bad", BAD_REQUESTS)
def test_requests_that_cannot_be_met(bad: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data", "nova", 1)
    change, message = BAD_REQUESTS[bad]
    data, output = Path(change.get("data", "data")), Path(change.get("output", "out"))
    rest = {key: x for key, x in change.items() if key not in ("data", "output")}
    assert main(command("nova", data, output, **rest)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vidgen train: ") and re.search(message, error)
    assert not (tmp_path / "out").exists()


TEXT = torch.zeros(1, 16, 32)
BAD_SAMPLES = {
    "nova without text": ("nova", {"prompt_embeds.0": None}, "embeddings: expected prompt_embeds"),
    "nova size": ("nova", {"latents": torch.zeros(4, 2, 8, 8)}, r"\[4, any, 8, 12\], got \[4, 2"),
    "nova width": ("nova", {"prompt_embeds.0": torch.zeros(3, 4)}, "prompt_embeds.0: expected"),
    "nova fps": ("nova", {"fps": torch.zeros(2)}, r"fps: expected shape \[1\], got \[2\]"),
    "nova texts": ("nova", {"prompt_embeds.1": torch.zeros(3, 16)}, "expected one prompt, got 2"),
    "nova others": ("nova", {"latents": torch.zeros(4, 3, 8, 12)}, "as in 0.safetensors, got"),
    "no latents": ("repvideo", {"latents": None}, "latents: expected a tensor, got prompt_embeds"),
    "repvideo": ("repvideo", {"latents": torch.zeros(3, 16, 5, 8)}, "whole patches of 1 x 2 x 2"),
    "no frames": ("repvideo", {"latents": torch.zeros(0, 16, 6, 8)}, r"got \[0, 16, 6, 8\]"),
    "repvideo texts": ("repvideo", {"prompt_embeds": torch.zeros(2, 8, 16)}, "one prompt, got 2"),
    "pyramid": ("pyramid-flow", {"latents": torch.zeros(4, 1, 8, 12)}, "in multiples of 8, got"),
    "pyramid text": ("pyramid-flow", {"prompt.text": TEXT[:, 1:]}, r"prompt.text_mask: expected"),
    "pyramid empty": ("pyramid-flow", {"negative.text": TEXT[:, 1:]}, "negative.text_mask: expec"),
    "pyramid left over": ("pyramid-flow", {"label": torch.zeros(1)}, "embeddings: expected"),
}


@pytest.mark.parametrize("bad", BAD_SAMPLES)
def test_samples_that_do_not_fit_are_named(bad: str, tmp_path: Path, capsys) -> None:
    model, change, message = BAD_SAMPLES[bad]
    data = write_data(tmp_path / "data", model, 1)
    tensors = {key: x for key, x in {**sample(model, 1), **change}.items() if x is not None}
    save_file({key: x.contiguous() for key, x in tensors.items()}, data / "1.safetensors")
    assert main(command(model, data, tmp_path / "out", **{"batch-size": 2})) == 1
    error = capsys.readouterr().err
    assert "1.safetensors: " in error and re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_samples_that_cannot_be_read(tmp_path: Path, capsys) -> None:
    data = write_data(tmp_path / "data", "nova", 1)
    (data / "1.safetensors").write_bytes(b"not a header")
    assert main(command("nova", data, tmp_path / "out")) == 1
    assert "1.safetensors: " in capsys.readouterr().err
    without = sample("pyramid-flow", 0)
    without = {key: x for key, x in without.items() if not key.startswith("negative")}
    with pytest.raises(ValueError, match="negative: expected an empty prompt, or no prompt drop"):
        objective_of("pyramid-flow", prompt_dropout=0.1).read(without)
    assert objective_of("pyramid-flow").read(without).keys() == without.keys()


def test_labels() -> None:
    config = replace(SMALL, text_token_dim=None, video_base_size=(1, 2, 3), video_mixer_rank=None)
    model = fresh_model(config).requires_grad_(True)
    objective = NovaObjective(model, {}, FlowMatching(), 4, prompt_dropout=0.5)
    tensors = {"latents": torch.zeros(4, 1, 8, 12), "label": torch.tensor([999])}
    batch = Batch(
        [objective.read(tensors)] * 2,
        range(2),
        [torch.Generator().manual_seed(i) for i in range(2)],
        torch.Generator().manual_seed(0),
    )
    assert objective(batch).isfinite()
    with pytest.raises(ValueError, match="label: expected 0 to 999, got 1000"):
        objective.read({**tensors, "label": torch.tensor(1000)})
    with pytest.raises(ValueError, match="label: expected it beside the latents, got nothing"):
        objective.read({"latents": tensors["latents"]})


# ---- the options of the models


@pytest.mark.parametrize(
    ("model", "argv"),
    [
        ("nova", "--spatial-attention set_causal --sets 4"),
        ("pyramid-flow", "--full-sequence"),
        ("pyramid-flow", "--ratios 0 1 0 --frames-per-unit 2"),
    ],
)
def test_options_change_the_objective(model: str, argv: str) -> None:
    found = [
        objective(batch_of(objective, model, range(2)))
        for objective in (objective_of(model, argv=argv), objective_of(model))
    ]
    assert found[0].isfinite() and found[0] != found[1]


def test_options_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match=r"ratios: .* not all 0, got \[0, 0, 0\]"):
        objective_of("pyramid-flow", argv="--ratios 0 0 0")
    with pytest.raises(ValueError, match="sets: expected at most 24, the tokens of a frame"):
        objective_of("nova", argv="--spatial-attention set_causal --sets 25")


def test_plain_cogvideox_is_given_gates(tmp_path: Path) -> None:
    plain = CogVideoXTransformer(replace(SMALL_REPVIDEO, gates=False))
    write_checkpoint(tmp_path / "plain", RepVideoObjective(plain), {})
    data, output = write_data(tmp_path / "data", "repvideo", 1), tmp_path / "out"
    options = {"steps": 1, "checkpoint": tmp_path / "plain", "gates": True}
    with pytest.warns(UserWarning, match="all gates are set to 0"):
        assert main(command("repvideo", data, output, **options)) == 0
    gates = load_file(output / "step_000001" / WEIGHTS)["learnable_gating"]
    assert gates.abs().max() > 0
    of_image = CogVideoXTransformer(replace(SMALL_REPVIDEO, in_channels=32))
    with pytest.raises(ValueError, match=r"text-to-video model, of in_channels 16 .* got 32"):
        RepVideoObjective(of_image)


# ---- the parts


@pytest.mark.parametrize("model", MODELS)
def test_gradients_do_not_depend_on_how_a_batch_is_shared(model: str) -> None:
    """Nor on the ops, nor on what is kept for the backward."""
    expected: dict[str, Tensor] = {}
    for ops, kept in ((EAGER, False), (FUSED, True)):
        objective = objective_of(model, ops, gradient_checkpointing=kept, prompt_dropout=0.3)
        objective(batch_of(objective, model, range(2))).backward()
        together = gradients(objective)
        objective.zero_grad(set_to_none=True)
        for i in range(2):
            (objective(batch_of(objective, model, range(i, i + 1))) / 2).backward()
        for name, x in gradients(objective).items():
            torch.testing.assert_close(x, together[name], rtol=2e-3, atol=2e-5)
            torch.testing.assert_close(x, expected.get(name, x), rtol=2e-3, atol=2e-5)
        expected = together
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert expected.keys() == trained


def test_a_single_frame_gives_all_parameters_a_gradient() -> None:
    objective = objective_of("nova")
    batch = batch_of(objective, "nova", range(1))
    batch.samples[0]["latents"] = batch.samples[0]["latents"][:, :1]
    objective(batch).backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_every_stage_sees_every_length_long_ones_beside_short_ones() -> None:
    objective = objective_of("pyramid-flow")
    seen = []
    for position in range(12):
        generator = torch.Generator().manual_seed(position)
        column = objective._column(sample("pyramid-flow", 0)["latents"][None], position, generator)
        n_frames = sum(clip.shape[2] for clip in column.clips)
        seen.append((column.clips[-1].shape[-1], n_frames))
    assert [width for width, _ in seen] == [4, 8, 8, 16] * 3
    rounds = [[n for _, n in seen[i : i + 4]] for i in range(0, 12, 4)]
    assert all(low == mid == also_mid == 4 - high for low, mid, also_mid, high in rounds)
    assert {high for *_, high in rounds} == {1, 2, 3}
