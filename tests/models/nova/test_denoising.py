"""NOVA's denoising loop of one set: the released order and ours, and how much work each is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vidgen.nova.model.denoiser import DenoisingMLP
from vidgen.nova.model.embeddings import patchify
from vidgen.nova.model.vit import take
from vidgen.nova.sampling import denoising
from vidgen.nova.sampling.denoising import SetDenoiser, denoise_latents
from vidgen.nova.sampling.guidance import Guidance
from vidgen.nova.sampling.schedules import DDPM, FlowMatching, Schedule
from vidgen.ops import EAGER, FUSED, Ops

Loop = Callable[[], Tensor]

GRID, PATCH, CHANNELS, WIDTH = (4, 6), 2, 3, 12
SCHEDULES = {
    "flow": FlowMatching(shift=2.0),
    "ddpm": DDPM(beta_schedule="squaredcos_cap_v2", clip_sample=False),
    "ddpm_clip": DDPM(prediction_type="v_prediction", clip_sample_range=0.7),
}
GUIDANCE = {
    "none": Guidance(guidance_scale=1),
    "plain": Guidance(guidance_scale=3),
    "truncated": Guidance(guidance_scale=3, guidance_trunc=500),
    "renorm": Guidance(guidance_scale=3, guidance_renorm=0.4, guidance_trunc=100),
    "image": Guidance(guidance_scale=3, image_guidance_scale=1.5, guidance_renorm=0.6),
    "spatiotemporal": Guidance(guidance_scale=3, spatiotemporal_guidance_scale=0.5),
}


def make_mlp(ops: Ops, *, width: int = 10, depth: int = 2, dtype=torch.float64) -> DenoisingMLP:
    torch.manual_seed(0)
    mlp = DenoisingMLP(depth, width, WIDTH, CHANNELS, PATCH, ops)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return mlp.to(dtype).requires_grad_(False)


class Inputs:
    """Features of all tokens, noise, and a set of ``n`` tokens of each of two samples."""

    def __init__(self, guidance: Guidance, n_steps: int, n: int, dtype=torch.float64) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        n_tokens, height, width = GRID[0] * GRID[1], PATCH * GRID[0], PATCH * GRID[1]
        self.guidance = guidance
        self.z = normal(2 * guidance.n_branches, n_tokens, WIDTH)
        self.x = normal(2, CHANNELS, height, width)
        self.noise = normal(n_steps, 2, CHANNELS, height, width)
        order = torch.rand(2, n_tokens, generator=generator).argsort(dim=1)
        self.ids, self.others = order[:, :n], order[:, n:]

    def latents_loop(self, mlp: DenoisingMLP, schedule: Schedule, n_steps: int) -> Loop:
        arguments = self.guidance, self.z, self.x, self.ids, GRID, 3.0
        return lambda: denoise_latents(mlp, schedule.steps(n_steps), *arguments, self.noise)

    def set_loop(self, mlp: DenoisingMLP, schedule: Schedule, n_steps: int) -> Loop:
        denoise = SetDenoiser(mlp, schedule.steps(n_steps), self.guidance)
        tokens = patchify(self.x, PATCH)
        noise = [patchify(x, PATCH) for x in self.noise]
        options = {"noise": torch.stack([take(x, self.ids) for x in noise])}
        if self.guidance.guidance_renorm < 1:
            options["rest"] = take(tokens, self.others)
            options["rest_noise"] = torch.stack([take(x, self.others) for x in noise])
        z = take(self.z, self.ids.repeat(self.guidance.n_branches, 1))
        return lambda: denoise(z, take(tokens, self.ids), 3.0, **options)

    def of_latents(self, mlp: DenoisingMLP, schedule: Schedule, n_steps: int) -> Tensor:
        latents = self.latents_loop(mlp, schedule, n_steps)()
        return take(patchify(latents, PATCH), self.ids)

    def of_set(self, mlp: DenoisingMLP, schedule: Schedule, n_steps: int) -> Tensor:
        return self.set_loop(mlp, schedule, n_steps)()


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(
    "schedule",
    ["flow", *(pytest.param(n, marks=pytest.mark.portable_only) for n in SCHEDULES if n != "flow")],
)
@pytest.mark.parametrize(
    "ops",
    [
        pytest.param(EAGER, id="eager", marks=pytest.mark.portable_only),
        pytest.param(FUSED, id="fused"),
    ],
)
def test_a_set_alone_is_what_it_is_in_the_whole_latent(ops, schedule, guidance):
    inputs = Inputs(GUIDANCE[guidance], 4, 5)
    expected = inputs.of_latents(make_mlp(EAGER), SCHEDULES[schedule], 4)
    actual = inputs.of_set(make_mlp(ops), SCHEDULES[schedule], 4)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.portable_only
def test_steps_may_be_tabulated_in_any_number(monkeypatch):
    inputs = Inputs(GUIDANCE["truncated"], 5, 3)
    results = []
    for n_elements in (1, 2 * 2 * 3 * 80, 10**9):  # one step, two steps, all steps
        monkeypatch.setattr(denoising, "TABLE_ELEMENTS", n_elements)
        results.append(inputs.of_set(make_mlp(FUSED), FlowMatching(), 5))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.portable_only
def test_what_does_not_change_is_computed_once():
    mlp, inputs = make_mlp(FUSED), Inputs(GUIDANCE["plain"], 6, 4)
    calls = {"condition": 0, "time": 0, "modulation": 0, "block": 0}

    def count(name: str):
        def hook(module, args, output) -> None:
            calls[name] += 1

        return hook

    mlp.time_cond_embed.condition_proj.register_forward_hook(count("condition"))
    mlp.time_cond_embed.timestep_proj.register_forward_hook(count("time"))
    blocks: Any = mlp.blocks
    for block in blocks:
        block.norm1.proj.register_forward_hook(count("modulation"))
        block.proj.register_forward_hook(count("block"))
    inputs.of_set(mlp, FlowMatching(), 6)
    assert calls == {"condition": 1, "time": 1, "modulation": 2, "block": 2 * 6}


def n_calls(function) -> int:
    """Operators called from Python: what they call in turn, views too, is not counted."""
    function()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        function()
    names = "aten::", "vidgen::"
    events = [event for event in profiled.events() or () if event.name.startswith(names)]
    return sum(
        event.cpu_parent is None or not event.cpu_parent.name.startswith(names) for event in events
    )


@pytest.mark.portable_only
@pytest.mark.parametrize("schedule", ["flow", "ddpm"])
def test_a_third_of_the_calls(schedule):
    """Of the released MLP's depth and number of steps; calls do not depend on widths."""
    inputs, n_steps = Inputs(GUIDANCE["plain"], 25, 5, torch.float32), 25
    eager, fused = (make_mlp(ops, depth=3, width=32, dtype=torch.float32) for ops in (EAGER, FUSED))
    released = n_calls(inputs.latents_loop(eager, SCHEDULES[schedule], n_steps))
    ours = n_calls(inputs.set_loop(fused, SCHEDULES[schedule], n_steps))
    assert 3 * ours <= released


@pytest.mark.portable_only
def test_truncation_leaves_the_conditional_branch_alone():
    guidance = replace(GUIDANCE["plain"], guidance_trunc=10**6)
    inputs, alone = Inputs(guidance, 3, 4), Inputs(GUIDANCE["none"], 3, 4)
    alone.z, alone.x, alone.ids = inputs.z[:2], inputs.x, inputs.ids
    mlp = make_mlp(FUSED)
    torch.testing.assert_close(
        inputs.of_set(mlp, FlowMatching(), 3), alone.of_set(mlp, FlowMatching(), 3)
    )
