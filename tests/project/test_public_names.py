"""Names, commands and places that other people's code and habits rely on.

A name that goes or changes its place breaks them: it needs a line in CHANGELOG.md, and then here.
"""

import importlib
import re

import pytest

import vidgen_kernels
from tests.paths import ROOT
from vidgen import cli

pytestmark = pytest.mark.portable_only

OPERATORS = {
    *("IntervalMask", "interval_attention", "block_causal_attention", "set_masked_attention"),
    *("Modulation", "residual_norm", "post_norm_residual", "post_norm_adaln"),
    *("CacheWindow", "FeatureCache"),
    *("QKVStream", "qk_norm_rope"),
    *("downsample", "upsample_renoise", "block_noise", "renoise_coefficients"),
    *("TrainingPair", "training_pair"),
    *("euler_step", "ddim_step", "dpm_step"),
}
FEATURE_CACHE = {"WINDOW", "CacheWindow", "FeatureCache", "Segment", "mix", "n_entries", "segment"}
COMMANDS = {"bench", "generate", "train", "convert", "analyze", "verify", "profile", "info"}
TARGETS = {
    *("help", "setup", "test", "quick", "lint", "portable", "interpreted", "aot-old-triton"),
    *("fuzz", "bench", "gpu", "format", "clean"),
}


def test_operators() -> None:
    assert set(vidgen_kernels.__all__) == OPERATORS
    names: dict[str, object] = {}
    exec("from vidgen_kernels import *", names)
    assert names.keys() >= OPERATORS


def test_feature_cache_is_imported_by_its_own_name() -> None:
    module = importlib.import_module("vidgen_kernels.feature_cache")
    assert vidgen_kernels.feature_cache is module
    assert {*module.__all__} == FEATURE_CACHE and all(hasattr(module, n) for n in FEATURE_CACHE)


def test_the_drop_in_for_diffusers() -> None:
    module = pytest.importorskip("vidgen_kernels.integrations.diffusers")
    assert callable(module.accelerate)


def test_commands() -> None:
    assert set(cli.COMMANDS) == COMMANDS


def test_make_targets() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(targets) == TARGETS


@pytest.mark.parametrize("suite", ["attention", "memory", "models", "samplers", "scaling"])
def test_each_suite_of_benchmarks_is_a_file(suite: str) -> None:
    assert (ROOT / "bench" / f"bench_{suite}.py").exists()


def test_results_are_filed_by_gpu() -> None:
    from bench.report import report

    assert report.RESULTS == ROOT / "bench" / "results"
    assert report.folder_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    assert (report.RESULTS / "a100" / "static.md").exists()


def test_where_golden_cases_are_looked_for() -> None:
    from vidgen.commands import verify

    assert verify.GOLDEN == ROOT / "tests" / "golden"
