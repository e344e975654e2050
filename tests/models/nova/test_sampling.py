"""NOVA's sampling: schedules, guidance, whole runs in every order, caches, the command."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.paths import GOLDEN
from vidgen.commands.verify import check, find_cases
from vidgen.common.golden import Where
from vidgen.nova.checks import golden_sampling
from vidgen.nova.model import set_causal
from vidgen.nova.model.config import Arch, Decoder, Encoder, NovaConfig
from vidgen.nova.model.transformer import NovaTransformer
from vidgen.nova.sampling import graphs, sampler
from vidgen.nova.sampling.draws import RandomDraws
from vidgen.nova.sampling.frames import CausalFrames, Frames, ReleasedFrames, SortedFrames
from vidgen.nova.sampling.graphs import BucketedFrames
from vidgen.nova.sampling.guidance import Guidance
from vidgen.nova.sampling.sampler import SamplingConfig, class_condition, sample, text_condition
from vidgen.nova.sampling.schedules import DDPM, FlowMatching, set_sizes
from vidgen.nova.text import TextFeatures
from vidgen.ops import EAGER, FUSED

CASES = {
    case.path.stem: case
    for case in find_cases(GOLDEN / "nova")
    if case.kind in golden_sampling.KINDS
}

TINY = NovaConfig(
    image_dim=2,
    image_size=(64, 96),
    text_token_dim=6,
    text_token_len=4,
    video_base_size=(3, 2, 3),
    video_mixer_rank=2,
    arch=Arch(Encoder(2, 24, 2), Encoder(3, 24, 2, 1), Decoder(2, 20)),
)
ROTARY = replace(
    TINY,
    rotary_pos_embed=True,
    video_mixer_rank=None,
    arch=Arch(Encoder(1, 32, 1), Encoder(2, 32, 1, 1), Decoder(1, 20)),
)
RUN = SamplingConfig(
    num_inference_steps=5, num_diffusion_steps=3, max_latent_length=3, guidance=Guidance(3.0)
)
both_ops = pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])


def model_of(config: NovaConfig = TINY, ops=FUSED) -> NovaTransformer:
    """With norms and biases that are not those of a fresh model."""
    torch.manual_seed(0)
    model = NovaTransformer(config, ops).double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def features(n_samples: int = 2, width: int = 6) -> TextFeatures:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(4 - i % 2, width, generator=generator).double() for i in range(n_samples)]
    negative = torch.randn(2, width, generator=generator).double()
    return TextFeatures(rows, [negative] * n_samples)


def random_draws(config: NovaConfig, n_samples: int, seed: int = 5) -> RandomDraws:
    generator = torch.Generator().manual_seed(seed)
    size = n_samples, config.image_dim, *config.latent_size
    return RandomDraws(size, generator, torch.float64, torch.device("cpu"))


def latents(
    model: NovaTransformer, run: SamplingConfig, *, n_samples: int = 2, **options
) -> Tensor:
    condition = text_condition(model, features(n_samples), run.guidance, 7.0)
    draws = options.pop("draws", None) or random_draws(model.config, n_samples)
    return torch.cat([*sample(model, condition, run, draws, **options)], dim=2)


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


# ---- recorded cases


@pytest.mark.portable_only  # a whole loop is thousands of calls
@both_ops
@pytest.mark.parametrize("name", sorted(name for name in CASES if name.startswith("loop")))
def test_recorded_loops(name, ops):
    outcome = check(CASES[name], "fused" if ops is FUSED else "eager", torch.float32, "cpu")
    assert outcome.status == "PASS", outcome


@pytest.mark.portable_only
def test_a_recorded_loop_of_one_set():
    case = CASES["loop_t2i_fm"]
    w, inputs = (case.tensors(prefix, "cpu") for prefix in ("w.", "in."))
    config = {**case.config, "num_inference_steps": 1}
    run = golden_sampling.KINDS[case.kind]
    eager, fused = (run(config, w, inputs, ops) for ops in (EAGER, FUSED))
    torch.testing.assert_close(eager["latents"], fused["latents"], rtol=1e-4, atol=1e-4)
    for name in ("z_first", "z_last", "sample_first"):
        a, b = (x[name] for x in (eager, fused))
        assert isinstance(a, Where) and isinstance(b, Where) and a.compared.all()
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-4)


# ---- whole runs


ROUNDS = {
    "flow": RUN,
    "ddpm": replace(RUN, schedule=DDPM(clip_sample=False, beta_schedule="squaredcos_cap_v2")),
    "one_branch": replace(RUN, guidance=Guidance(1.0), max_latent_length=1),
    "all_options": replace(
        RUN,
        guidance=Guidance(
            4.0, 1.5, guidance_trunc=400, guidance_renorm=0.5, image_guidance_scale=2
        ),
        schedule=FlowMatching(shift=2.0),
    ),
    "many_sets": replace(RUN, num_inference_steps=40, max_latent_length=1),
}


@pytest.mark.portable_only
@pytest.mark.parametrize("config", [TINY, ROTARY], ids=["absolute", "rotary"])
@pytest.mark.parametrize("name", ROUNDS)
def test_our_order_is_the_released_one(name, config):
    run = ROUNDS[name]
    expected = latents(model_of(config, EAGER), replace(run, order="official"))
    assert_same(latents(model_of(config, FUSED), run), expected)
    assert expected.shape == (2, 2, run.max_latent_length, 8, 12)


class Bucketed(BucketedFrames):
    """In the shapes of graphs, but never captured."""

    @staticmethod
    def capture(function):
        return function


@pytest.mark.portable_only
@pytest.mark.parametrize("name", ["flow", "ddpm", "one_branch", "many_sets"])
@pytest.mark.parametrize("config", [TINY, ROTARY], ids=["absolute", "rotary"])
def test_shapes_of_graphs_change_nothing(config, name, monkeypatch):
    model = model_of(config)
    expected = latents(model, ROUNDS[name])
    monkeypatch.setattr(graphs, "VISIBLE", 5)
    monkeypatch.setattr(graphs, "ROWS", 4)
    monkeypatch.setattr(sampler, "SortedFrames", Bucketed)
    assert_same(latents(model, ROUNDS[name]), expected)


@pytest.mark.portable_only
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "graphs: expected False on cpu, got True"),
        ({"order": "official"}, "graphs: expected False for the official order"),
        ({"guidance": Guidance(3.0, 1.0)}, "graphs: expected guidance of at most two branches"),
    ],
)
def test_graphs_that_are_not_built(options, message):
    with pytest.raises(ValueError, match=message):
        latents(model_of(), replace(RUN, graphs=True, **options))


@pytest.mark.parametrize("spatial", ["masked", "set_causal"])
def test_eager_and_fused_agree(spatial):
    config = replace(TINY, spatial_attention=spatial)
    run = replace(RUN, max_latent_length=1, num_inference_steps=2, num_diffusion_steps=1)
    expected = latents(model_of(config, EAGER), run, n_samples=1)
    assert_same(latents(model_of(config, FUSED), run, n_samples=1), expected)


class Replayed:
    """The draws of a run from some frame on."""

    def __init__(self, draws: RandomDraws, n_sets: int) -> None:
        self.first, self.draws = draws.order(24), draws
        for _ in range(n_sets):
            draws.start()

    def order(self, n_tokens: int) -> Tensor:
        return self.first

    def start(self) -> Tensor:
        return self.draws.start()

    def during(self, n_steps: int) -> Tensor:
        return self.draws.during(n_steps)


@pytest.mark.portable_only
@pytest.mark.parametrize("n_given", [1, 2, 4])
def test_given_frames_enter_in_one_pass(n_given):
    """More frames than the base length, too: the clip is continued as it was begun."""
    model, run = model_of(), replace(RUN, max_latent_length=4)
    whole = latents(model, run)
    n_sets = sum(n > 0 for n in set_sizes(24, run.num_inference_steps))
    draws = Replayed(random_draws(model.config, 2), n_given * n_sets)
    continued = latents(model, run, draws=draws, given=whole[:, :, :n_given])
    assert_same(continued, whole)


@pytest.mark.portable_only
def test_prompts_of_a_batch_do_not_mix():
    model, run = model_of(), replace(RUN, max_latent_length=2)
    size = 2, 2, 8, 12
    draws = random_draws(model.config, 2)
    order, noise = draws.order(24), iter([draws.start() for _ in range(10)])

    class Given:
        def __init__(self, rows: slice, noises: list[Tensor]) -> None:
            self.rows, self.noises = rows, iter(noises)

        def order(self, n_tokens: int) -> Tensor:
            return order[self.rows]

        def start(self) -> Tensor:
            return next(self.noises)[self.rows]

        def during(self, n_steps: int) -> Tensor:
            raise AssertionError("flow matching adds no noise")

    noises, text = [*noise], features()
    both = latents(model, run, draws=Given(slice(0, 2), noises))
    assert both.shape == (size[0], size[1], 2, *size[2:])
    one = TextFeatures(text.prompt[1:], text.negative[1:])
    condition = text_condition(model, one, run.guidance, 7.0)
    alone = sample(model, condition, run, Given(slice(1, 2), noises))
    assert_same(torch.cat([*alone], dim=2), both[1:])


class Uncached(SortedFrames):
    """Set-causal features from one pass over the whole frame for every set."""

    def predict(self, condition, content: list[Tensor], first: int, last: int) -> Tensor:
        known = torch.cat([self.masks[:, :0], *content], dim=1)
        unknown = torch.full_like(self.masks[:, first:], 17.0)  # must not be seen
        back = self.ids.argsort(dim=1)[:, :, None].expand_as(self.masks)
        in_place = torch.cat([known, unknown], dim=1).gather(1, back)
        queries = self.masks.gather(1, back)
        z = set_causal.predict_all(self.encoder, in_place, queries, condition, self.ids, self.sizes)
        return z.gather(1, self.ids[:, first:last, None].expand(-1, -1, z.shape[-1]))


@pytest.mark.portable_only
@pytest.mark.parametrize("config", [TINY, ROTARY], ids=["absolute", "rotary"])
def test_set_causal_cache_is_exact(config, monkeypatch):
    model = model_of(replace(config, spatial_attention="set_causal"))
    expected = latents(model, RUN)
    monkeypatch.setattr("vidgen.nova.sampling.sampler.CausalFrames", Uncached)
    assert_same(latents(model, RUN), expected)
    with pytest.raises(ValueError, match="order: expected sorted for a set-causal model"):
        latents(model, replace(RUN, order="official"))


def flops(kind: type[Frames], spatial_attention: str) -> int:
    """Of the encoder for one frame at the tokens and width of 480 x 768 video, in few layers."""
    arch = Arch(Encoder(1, 1024, 16), Encoder(2, 1024, 16, 1), Decoder(1, 4))
    config = NovaConfig(arch=arch, spatial_attention=spatial_attention)
    with torch.device("meta"):
        model = NovaTransformer(config, EAGER)
    draws = RandomDraws((1, 4, 60, 96), None, torch.float32, torch.device("meta"))
    condition = torch.empty(2, config.n_video_tokens, 1024, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        kind(model, [], Guidance(), draws, 16).make(condition)
    return counter.get_total_flops()


@pytest.mark.portable_only
def test_a_set_causal_frame_takes_far_fewer_operations():
    """In 16 sets; the more sets, the fewer: 1 / 37 of the released order's in 64 sets."""
    causal = flops(CausalFrames, "set_causal")
    assert 7 * causal < flops(ReleasedFrames, "masked")
    assert 4 * causal < flops(SortedFrames, "masked")


@pytest.mark.portable_only
def test_classes():
    config = replace(TINY, text_token_dim=None, video_base_size=(1, 2, 3), video_mixer_rank=None)
    model, run = model_of(config), replace(RUN, max_latent_length=1)
    condition = class_condition(model, [3, 999], run.guidance)
    assert condition.shape == (4, 1, 24)
    assert_same(condition[2:], model.condition(labels=torch.tensor([1000, 1000])))
    (made,) = sample(model, condition, run, random_draws(config, 2))
    assert made.shape == (2, 2, 1, 8, 12)
    with pytest.raises(ValueError, match="labels: expected 0 to 1000, got 1001"):
        class_condition(model, [1001], run.guidance)


@pytest.mark.portable_only
def test_requests_that_cannot_be_met():
    model = model_of()
    condition = text_condition(model, features(), RUN.guidance)
    draws = random_draws(TINY, 2)
    cases: list[tuple[Any, str]] = [
        ({"given": torch.zeros(2, 2, 4, 8, 12)}, "given: expected 1 to 3 frames, got 4"),
        ({"given": torch.zeros(2, 2, 1, 8, 8)}, r"given: expected shape \[2, 2, frames, 8, 12\]"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            sample(model, condition, RUN, draws, **options)
    with pytest.raises(ValueError, match=r"condition: expected shape \[2 B, 6, 24\]"):
        sample(model, condition[:, 1:], RUN, draws)
    one = features()._replace(negative=features().negative[:1])
    with pytest.raises(ValueError, match="negative prompts: expected 2, got 1"):
        text_condition(model, one, RUN.guidance)
    with pytest.raises(ValueError, match="flow: expected a finite number, got nan"):
        text_condition(model, features(), RUN.guidance, float("nan"))
    with pytest.raises(ValueError, match="num_inference_steps: expected at least 1, got 0"):
        SamplingConfig(num_inference_steps=0)
    with pytest.raises(ValueError, match="order: expected sorted or official, got 'random'"):
        SamplingConfig(order="random")


@pytest.mark.portable_only
def test_random_draws():
    draws = random_draws(TINY, 3)
    order = draws.order(24)
    assert (order.sort(dim=1).values == torch.arange(24)).all()
    assert not (order[0] == order[1]).all()
    assert draws.during(2).shape == (2, 3, 2, 8, 12)
    again = random_draws(TINY, 3)
    assert (again.order(24) == order).all()
