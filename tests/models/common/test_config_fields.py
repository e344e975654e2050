"""What a config.json says is of the types that a model is built of."""

import math
from dataclasses import fields
from typing import Any

import pytest

from vidgen.common.config_fields import check_fields
from vidgen.nova.model.config import NovaConfig
from vidgen.nova.vae.config import VAEConfig as NovaVAEConfig
from vidgen.pyramid_flow.model.config import FluxConfig, MMDiTConfig
from vidgen.pyramid_flow.vae.config import VAEConfig as PyramidVAEConfig
from vidgen.repvideo.model.config import CogVideoXConfig

pytestmark = pytest.mark.portable_only

CONFIGS: tuple[Any, ...] = (
    FluxConfig, MMDiTConfig, PyramidVAEConfig, CogVideoXConfig, NovaConfig, NovaVAEConfig,
)  # fmt: skip
NUMBERS = [
    (config, field.name)
    for config in CONFIGS
    for field in fields(config)
    if type(field.default) in (int, float) and "None" not in str(field.type)
]


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_are_of_their_types(config: Any) -> None:
    check_fields(config(), signed=["video_mixer_rank"])


@pytest.mark.parametrize("value", ["x", None, [], {}, True, math.nan, math.inf], ids=repr)
@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_no_number(config: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected "):
        config.from_dict({name: value})


@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_no_count(config: Any, name: str) -> None:
    if type(getattr(config, name)) is int:
        for value in (-1, 2.5):
            with pytest.raises(ValueError, match=rf"{name}: expected "):
                config.from_dict({name: value})


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (FluxConfig, "axes_dims_rope", [16, "x", 24]),
        (FluxConfig, "axes_dims_rope", 64),
        (FluxConfig, "use_temporal_causal", "yes"),
        (PyramidVAEConfig, "encoder_layers_per_block", [2, 2, None, 2]),
        (PyramidVAEConfig, "encoder_spatial_down_sample", [1, 1, 1, 0]),
        (CogVideoXConfig, "ofs_embed_dim", "x"),
        (NovaConfig, "video_base_size", [16, 15]),
        (NovaVAEConfig, "block_out_channels", 3),
    ],
)
def test_no_sizes(config: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected "):
        config.from_dict({name: value})
