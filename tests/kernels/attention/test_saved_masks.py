"""Masks in files and copies: small, and read back without trust."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.paths import ROOT
from vidgen_kernels import IntervalMask

pytestmark = pytest.mark.portable_only

MASKS = {
    "frames": lambda: IntervalMask.block_causal([500] * 16, window=3, sink_blocks=1),
    "teacher forcing": lambda: IntervalMask.teacher_forcing([250] * 16),
    "text": lambda: IntervalMask.pad_text(IntervalMask.block_causal([500] * 16), 100, [7, 100]),
    "packed": lambda: IntervalMask.pack([IntervalMask.block_causal([500] * 8)] * 2),
    "lengths of a tensor": lambda: IntervalMask.block_causal(torch.tensor([500] * 16)),
}
every_mask = pytest.mark.parametrize("name", MASKS)


def used(name: str) -> IntervalMask:
    """Its per-token tables are there."""
    mask = MASKS[name]()
    mask.intervals(8000, 8000)
    return mask


def saved(mask: IntervalMask) -> bytes:
    buffer = io.BytesIO()
    torch.save(mask, buffer)
    return buffer.getvalue()


@every_mask
def test_files_hold_no_tables(name: str) -> None:
    mask = used(name)
    assert len(saved(mask)) < 16_000 and len(pickle.dumps(mask)) < 16_000  # a table has 32 kB


@every_mask
def test_masks_come_back(name: str) -> None:
    mask = used(name)
    loaded = torch.load(io.BytesIO(saved(mask)), weights_only=True)
    for again in (loaded, pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), copy.copy(mask)):
        assert not again._per_token and mask._per_token
        for a, b in zip(again.intervals(8000, 8000), mask.intervals(8000, 8000), strict=True):
            assert torch.equal(a, b)
        assert len(again.parts) == len(mask.parts)


def test_importing_the_package_is_all_that_loading_takes(tmp_path: Path) -> None:
    (tmp_path / "mask.pt").write_bytes(saved(used("frames")))
    code = "import sys, torch, vidgen_kernels; print(torch.load(sys.argv[1]).n_keys)"
    command = [sys.executable, "-c", code, str(tmp_path / "mask.pt")]
    environment = {"PYTHONPATH": f"{ROOT / 'kernels'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "8000", done.stderr
