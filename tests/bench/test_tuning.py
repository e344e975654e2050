"""What can be tuned: every table of launch configurations, one kernel at a time."""

import pytest
import torch

from bench.gpu import subjects
from vidgen_kernels.attention import interval_attention
from vidgen_kernels.attention.configs import LaunchConfig, lookup
from vidgen_kernels.common.configs import RowConfig
from vidgen_kernels.latents import blocks
from vidgen_kernels.latents.configs import ELEMENTWISE
from vidgen_kernels.norms.configs import ROW_WISE as NORMS
from vidgen_kernels.rope.configs import ROW_WISE as ROPE

pytestmark = pytest.mark.portable_only


def test_tuning_forces_one_kernel_only() -> None:
    known = {subject.name: subject for subject in subjects.subjects()}
    subject = known["fwd-64"]
    config = subject.candidates()[0]
    args = (64, torch.bfloat16, 90)
    dq = interval_attention.lookup("dq", *args)
    with subject.forced(config):
        assert interval_attention.lookup("fwd", *args) == config
        assert interval_attention.lookup("dq", *args) == dq
    assert interval_attention.lookup is lookup
    pixels = known["pixel_blocks_fwd"]
    with pixels.forced(pixels.candidates()[-1]):
        assert blocks.lookup_pixel_blocks(torch.bfloat16, 90) == pixels.candidates()[-1]


def test_every_table_can_be_tuned() -> None:
    known = subjects.subjects()
    assert {s.kernel for s in known} >= {*NORMS, *ROPE, *ELEMENTWISE}
    assert len({s.name for s in known}) == len(known)
    assert all(s.shape in s.suite.names and s.candidates() for s in known)


def test_tuning_prints_entries_for_the_configs() -> None:
    known = {subject.name: subject for subject in subjects.subjects()}
    snippet = known["fwd-64"].snippet(LaunchConfig(128, 64, 8, 3, 64), 90)
    assert snippet == 'attention/configs.py: ("fwd", 16): {64: {90: C(128, 64, 8, 3, 64)}},'
    snippet = known["residual_norm_fwd-2048"].snippet(RowConfig(1, 8, 4), 90)
    assert snippet == 'norms/configs.py: "residual_norm_fwd": {2048: {90: R(1, 8, 4)}},'
