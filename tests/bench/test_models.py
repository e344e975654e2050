"""Steps of models and samplers as benchmarks: their tokens, their agreement, their compilation."""

import dataclasses

import pytest
import torch
from torch._dynamo import config as dynamo_config

from bench.measure import timing
from bench.models.calls import ModelCase, Reference
from bench.models.case import ModelStep, TokenStep, twin
from bench.models.providers import COMPILED_VARIANTS, compiled
from bench.models.pyramid_flow import PyramidTraining, PyramidVideo
from bench.models.registry import STEPS, VIDEOS
from bench.suites import MODELS, directions
from vidgen.nova.checks.example import CONFIGS, SetOfFrame
from vidgen.ops import EAGER, FUSED
from vidgen.pyramid_flow.checks.example import TrainingExample
from vidgen.repvideo.checks.example import SIZES

pytestmark = pytest.mark.portable_only

CPU = torch.device("cpu")
TOYS = [*STEPS["toy"], *VIDEOS["toy"]]
every_toy = pytest.mark.parametrize("spec", TOYS, ids=lambda s: s.name)
every_step = pytest.mark.parametrize("spec", STEPS["toy"], ids=lambda s: s.name)


KNOWN: dict[str, ModelStep] = {
    spec.name: spec for sets in (STEPS, VIDEOS) for specs in sets.values() for spec in specs
}


# ---- what is measured


@every_step
def test_tokens_of_a_step_are_those_of_its_example(spec: TokenStep) -> None:
    example = ModelCase.make(spec, torch.float32, CPU).example
    if isinstance(example, TrainingExample):
        clips = [clip for column in example.columns(EAGER) for clip in column.clips]
    elif hasattr(example, "clips"):
        clips = example.clips
    elif spec.name.startswith(("repvideo", "cogvideox")):
        latents = example.noised.latents if hasattr(example, "noised") else example.latents
        clips = [latents.transpose(1, 2)]
    elif spec.name.startswith("nova_train"):
        clips = [example.latents]
    elif spec.name.startswith("nova_temporal"):
        clips = [example.latents[..., ::2, ::2]]  # tokens of twice the side
    else:
        n_tokens = CONFIGS["toy"].n_tokens
        some = SetOfFrame.middle(n_tokens)
        n = some.last - some.first if "denoising" in spec.name else n_tokens
        clips = [torch.empty(2, 4, 1, 2, 2 * n)]
    assert spec.n_tokens == sum(clip[:, 0].numel() // 4 for clip in clips)


def test_tokens_at_released_sizes() -> None:
    """RepVideo: 13 x 30 x 45 patches, 2 rows. NOVA: 3 clips of 9 frames of 30 x 48 tokens."""
    assert SIZES["480p"].latents == (13, 60, 90)
    assert KNOWN["repvideo_2b_480p"].work == {"tokens_per_s": 2 * 17550}
    assert KNOWN["nova_train_480p"].work == {"tokens_per_s": 3 * 9 * 1440}
    assert KNOWN["nova_temporal_pass_480p"].work == {"tokens_per_s": 3 * 9 * 360}
    assert KNOWN["nova_denoising_set_480p"].work == {"tokens_per_s": 2 * 30}


def test_there_are_steps_of_every_model_in_every_set() -> None:
    families = ("flux", "mmdit", "repvideo", "cogvideox", "nova")
    for name, steps in STEPS.items():
        names = [step.name.removeprefix("cpu_") for step in steps]
        assert all(any(n.startswith(family) for n in names) for family in families), name
        videos = [video.name.removeprefix("cpu_") for video in VIDEOS[name]]
        assert {n.split("_")[0] for n in videos} >= {"flux", "repvideo", "nova"}, name


def test_the_projected_work_of_a_video() -> None:
    """Videos per hour are calls per hour, times the share of a video that a call makes."""
    video = PyramidVideo("flux", "384p")
    assert video.measured_share == 0.1 and video.work == {"videos_per_hour": 360}
    assert KNOWN["repvideo_2b_video_480p"].measured_share == 2 / 50
    assert KNOWN["nova_video_480p"].measured_share == 1 / 9


def test_sampling_has_no_backward() -> None:
    for spec in TOYS:
        expected = ("fwd", "bwd", "fwd+bwd") if "train" in spec.name else ("fwd",)
        if "temporal" not in spec.name:
            assert directions(spec) == expected, spec.name


# ---- the gate


def one_percent_off(case: ModelCase):
    """Every attention is off, and every norm that follows no attention."""

    def off(op):
        return lambda *args, **options: 1.01 * op(*args, **options)

    names = ("attention", "interval_attention", "post_norm_residual")
    ops = EAGER._replace(**{name: off(getattr(EAGER, name)) for name in names})
    return case.function(ops, "released")


@every_toy
def test_providers_agree(spec: ModelStep) -> None:
    case = ModelCase.make(spec, torch.float64, CPU)
    chosen = [MODELS.providers[name] for name in ("ours", "ours_cached", "ours_eager", "eager")]
    planted = dataclasses.replace(chosen[-1], name="planted", setup=one_percent_off)
    expected = dict.fromkeys((p.name for p in chosen), "measured") | {"planted": "wrong"}
    expected["ours_cached"] = "measured" if spec.has_cache else "unavailable"
    for backward in sorted({direction != "fwd" for direction in directions(spec)}):
        outcomes = timing.measure_group(case, backward, [*chosen, planted], once=True)
        assert {name: o.status for name, o in outcomes.items()} == expected, outcomes


def test_a_gradient_that_is_only_rounding_is_in_units_of_the_others() -> None:
    large, nothing = torch.tensor([2.0, -4.0]).double(), torch.tensor([3e-17]).double()
    reference = Reference(large, large, {0: large, 1: nothing})
    assert reference.gradient_error(torch.tensor([4e-6]), nothing) == pytest.approx(1e-6)
    assert reference.gradient_error(torch.tensor([4.0]), nothing) == pytest.approx(1.0)
    assert reference.gradient_error(torch.tensor([2.0, -3.0]), large) == 0.25


@pytest.mark.parametrize(
    ("name", "n_blocks"), [("flux_train_toy", 2), ("repvideo_5b_toy", 3), ("nova_train_toy", 8)]
)
def test_blocks_are_exchanged_with_the_parameters_of_the_model(name: str, n_blocks: int) -> None:
    """Blocks are wrapped as for compilation, which itself would take minutes."""
    case = ModelCase.make(KNOWN[name], torch.float32, CPU)
    called = []

    def watched(forward):
        def call(*args, **options):
            called.append(forward.__self__)
            return forward(*args, **options)

        return call

    function = case.function(EAGER, "released", watched)
    backward = "train" in name
    assert case.disagreement(function, backward) <= case.allowed(backward)
    blocks = {id(block) for block in called}
    assert len(blocks) == n_blocks
    assert blocks <= {id(module) for module in case.model.modules()}  # not copies of parameters


def test_blocks_of_a_kind_are_compiled_once() -> None:
    """Except for the first, which has no pending update. The backend compiles nothing."""
    limit = dynamo_config.recompile_limit
    spec = dataclasses.replace(KNOWN["cogvideox_2b_toy"], less=(1, 5))
    case = ModelCase.make(spec, torch.float32, CPU)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    function = compiled(case, backend)
    assert case.disagreement(function, backward=False) <= case.allowed(backward=False)
    torch.compiler.reset()
    assert len(graphs) == 2
    assert dynamo_config.recompile_limit == limit < COMPILED_VARIANTS


def test_a_twin_leaves_the_model_as_it_is() -> None:
    case = ModelCase.make(KNOWN["nova_train_toy"], torch.float32, CPU)
    made = twin(case.model, FUSED)
    assert made.image_encoder.ops is FUSED and made.image_decoder.ops is FUSED
    assert case.model.image_encoder.ops is EAGER
    assert made.get_parameter("image_decoder.head.weight") is case.model.image_decoder.head.weight


def test_training_reads_no_more_than_a_step() -> None:
    """The reference uses the columns of the example and does not draw new ones."""
    spec = PyramidTraining("flux", "toy", (1, 1), n_frames=3)
    case = ModelCase.make(spec, torch.float32, CPU)
    wide = spec.widened(case.example, torch.float64)
    loss = wide(case.model.double())
    assert loss.dtype == torch.float64 and loss == wide(case.model)
