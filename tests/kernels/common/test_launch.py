"""What launchers ask of PyTorch's settings, by every name that these have."""

from collections.abc import Callable, Iterator

import pytest
import torch

from vidgen_kernels.common.launch import dot_precision

pytestmark = pytest.mark.portable_only

matmul = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _settings_as_they_were() -> Iterator[None]:
    everywhere, here = torch.backends.fp32_precision, matmul.fp32_precision
    yield
    torch.backends.fp32_precision = everywhere
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = here


SETTINGS: dict[str, tuple[Callable[[], object], str]] = {
    "untouched": (lambda: None, "tf32x3"),
    "allow_tf32": (lambda: setattr(matmul, "allow_tf32", True), "tf32"),
    "no allow_tf32": (lambda: setattr(matmul, "allow_tf32", False), "tf32x3"),
    "high": (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), "tf32x3"),
    "matmul tf32": (lambda: setattr(matmul, "fp32_precision", "tf32"), "tf32"),
    "matmul ieee": (lambda: setattr(matmul, "fp32_precision", "ieee"), "tf32x3"),
    "all tf32": (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32"),
    "all ieee": (lambda: setattr(torch.backends, "fp32_precision", "ieee"), "tf32x3"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_plain_tf32_where_pytorch_may_use_it(name: str) -> None:
    change, expected = SETTINGS[name]
    change()
    assert dot_precision(torch.float32) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_have_one_precision(dtype: torch.dtype) -> None:
    matmul.fp32_precision = "tf32"
    assert dot_precision(dtype) == "ieee"
