"""NOVA's released sizes, configs, and checkpoints with nothing missing or left over."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidgen.nova.model.config import Encoder, NovaConfig
from vidgen.nova.model.transformer import NovaTransformer
from vidgen.nova.model.weights import load_pretrained, load_transformer
from vidgen.ops import FUSED

pytestmark = pytest.mark.portable_only

RAW = {  # config.json as stored
    "_class_name": "NOVATransformer3DModel",
    "_diffusers_version": "0.31.0",
    "arch": {
        "video_encoder": {"depth": 1, "embed_dim": 16, "num_heads": 2},
        "image_encoder": {"depth": 2, "embed_dim": 16, "num_heads": 2},
        "image_decoder": {"depth": 1, "embed_dim": 12, "cond_dim": 16},
    },
    "image_base_size": [2, 4],
    "image_dim": 4,
    "image_size": [32, 64],
    "image_stride": 8,
    "rotary_pos_embed": False,
    "text_token_dim": 6,
    "text_token_len": 3,
    "video_base_size": [2, 1, 2],
    "video_mixer_rank": 2,
}


CONFIG = NovaConfig.from_dict(RAW)


# Released models: width, depth and width of the MLP, frame size, mixer, base size, parameters.
RELEASED = {
    "d48w768-sdxl1024": (768, 6, 768, 1024, None, [1, 32, 32], 365_256_720),
    "d48w1024-sdxl1024": (1024, 6, 1024, 1024, None, [1, 32, 32], 647_004_176),
    "d48w1536-sdxl1024": (1536, 6, 1536, 1024, None, [1, 32, 32], 1_451_147_280),
    "d48w1024-sd512": (1024, 3, 1280, 512, None, [1, 16, 16], 642_803_728),
    "d48w1024-osp480": (1024, 3, 1280, [480, 768], 24, [16, 15, 24], 645_505_040),
}


def expected_shapes(width: int, depth: int, mlp: int, rank: int | None) -> dict[str, list[int]]:
    """The keys of a released checkpoint, written down from its layout."""
    shapes: dict[str, list[int]] = {}

    def linear(name: str, n_in: int, n_out: int) -> None:
        shapes.update({f"{name}.weight": [n_out, n_in], f"{name}.bias": [n_out]})

    def norm(name: str, n: int = width) -> None:
        shapes.update({f"{name}.weight": [n], f"{name}.bias": [n]})

    def conv(name: str, n_out: int, patch: int) -> None:
        shapes.update({f"{name}.weight": [n_out, 4, patch, patch], f"{name}.bias": [n_out]})

    for encoder, n_blocks, patch in (("video_encoder", 16, 4), ("image_encoder", 32, 2)):
        conv(f"{encoder}.patch_embed.proj", width, patch)
        norm(f"{encoder}.norm")
        for i in range(n_blocks):
            block = f"{encoder}.blocks.{i}"
            linear(f"{block}.attn.qkv", width, 3 * width)
            linear(f"{block}.attn.proj", width, width)
            linear(f"{block}.mlp.fc1", width, 4 * width)
            linear(f"{block}.mlp.fc2", 4 * width, width)
            norm(f"{block}.norm1")
            norm(f"{block}.norm2")
    conv("image_decoder.patch_embed.proj", mlp, 2)
    time_cond = "image_decoder.time_cond_embed"
    for name, n_in in (("timestep_proj", 256), ("condition_proj", width)):
        linear(f"{time_cond}.{name}.fc1", n_in, mlp)
        linear(f"{time_cond}.{name}.fc2", mlp, mlp)
    for i in range(depth):
        block = f"image_decoder.blocks.{i}"
        linear(f"{block}.norm1.proj", mlp, 3 * mlp)
        linear(f"{block}.proj.fc1", mlp, mlp)
        linear(f"{block}.proj.fc2", mlp, mlp)
        norm(f"{block}.norm2", mlp)
    linear("image_decoder.norm.proj", mlp, 2 * mlp)
    linear("image_decoder.head", mlp, 16)
    shapes |= {"mask_embed.bos_token": [1, width], "mask_embed.mask_token": [1, width]}
    shapes["text_embed.weight"] = [512, 2560]
    linear("text_embed.proj", 2560, width)
    norm("text_embed.norm")
    linear("video_pos_embed.time_proj.0", 256, width)
    linear("video_pos_embed.time_proj.2", width, width)
    norm("video_pos_embed.norm")
    if rank is not None:  # the released model with a mixer is that of videos
        shapes["video_encoder.mixer.lora.weight"] = [rank, width]
        linear("video_encoder.mixer.proj", rank, 2 * width)
        for name in ("flow_proj", "fps_proj"):
            linear(f"motion_embed.{name}.0", 256, width)
            linear(f"motion_embed.{name}.2", width, width)
    return shapes


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name: str) -> None:
    width, depth, mlp, size, rank, base_size, n_parameters = RELEASED[name]
    raw = {
        "_class_name": "NOVATransformer3DModel",
        "image_dim": 4,
        "image_size": size,
        "image_stride": 8,
        "text_token_dim": 2560,
        "text_token_len": 256,
        "video_base_size": base_size,
        "image_base_size": [2 * n for n in base_size[1:]],
        "video_mixer_rank": rank,
        "rotary_pos_embed": False,
        "arch": [f"vit_d16w{width}", f"vit_d32w{width}", f"mlp_d{depth}w{mlp}"],
    }
    config = NovaConfig.from_dict(raw)
    with torch.device("meta"):
        state = NovaTransformer(config).state_dict()
    shapes = {key: list(x.shape) for key, x in state.items()}
    assert shapes == expected_shapes(width, depth, mlp, rank)
    assert sum(x.numel() for x in state.values()) == n_parameters
    assert config.n_tokens == 4 * config.n_video_tokens == 4 * math.prod(base_size[1:])
    assert config.n_condition == (258 if rank else 256)
    assert config.arch.image_encoder.head_dim == (96 if width == 1536 else 64)
    if rank is not None:
        assert config == replace(NovaConfig(), image_base_size=(30, 48))


BAD_CONFIGS = {
    "unknown": ({"n_experts": 8}, r"n_experts"),
    "arch": ({"arch": ["vit_d16w1024", "mlp_d3w1280", "vit_d32w1024"]}, "arch: expected"),
    "width": ({"arch": ["vit_d16w1000", "vit_d32w1000", "mlp_d3w1280"]}, r"768, .* got 1000"),
    "widths": ({"arch": ["vit_d16w768", "vit_d32w1024", "mlp_d3w1280"]}, "one width, got 768 and"),
    "size": ({"image_size": 500}, r"multiples of 32, got \[500, 500\]"),
    "grid": ({"video_base_size": [1, 3, 3]}, r"\[16, 16\] tokens .* got \[3, 3\]"),
    "parts": ({"arch": {"image_encoder": {}}}, "none for image_decoder, video_encoder"),
    "no names": ({"arch": "vit_d16w1024"}, "names or sizes of three parts, got 'vit_d16w1024'"),
    "no size": (
        {"arch": {"video_encoder": {}, "image_encoder": {}, "image_decoder": {}}},
        "arch: expected depth and embed_dim",
    ),
    "one size": ({"image_size": [512]}, r"image_size: expected 2 whole numbers .* \(512,\)"),
    "text size": ({"image_size": "512"}, "image_size: expected 2 whole numbers .* '512'"),
    "base": ({"video_base_size": [0, 16, 16]}, "video_base_size: expected 3 whole numbers above 0"),
    "stride": ({"image_stride": 0}, "image_stride: expected a whole number above 0, got 0"),
    "channels": ({"image_dim": 4.5}, "image_dim: expected a whole number above 0, got 4.5"),
    "spatial": ({"spatial_attention": "causal"}, "expected masked or set_causal, got 'causal'"),
}


@pytest.mark.parametrize("bad", BAD_CONFIGS)
def test_configs_that_are_not_built(bad: str) -> None:
    change, message = BAD_CONFIGS[bad]
    arch = ["vit_d16w1024", "vit_d32w1024", "mlp_d3w1280"]
    raw = {"image_size": 512, "video_base_size": [1, 16, 16], "arch": arch}
    NovaConfig.from_dict(raw)
    with pytest.raises(ValueError, match=message):
        NovaConfig.from_dict(raw | change)


def test_encoders_that_are_not_built() -> None:
    with pytest.raises(ValueError, match="multiple of 5 heads, got 24"):
        Encoder(1, 24, 5)
    with pytest.raises(ValueError, match="num_heads: expected a whole number above 0, got 0"):
        Encoder(1, 24, 0)
    with pytest.raises(ValueError, match="text_token_len: expected at most 512, got 513"):
        NovaTransformer(replace(CONFIG, text_token_len=513))
    with pytest.raises(ValueError, match="encoder_depth: expected 0 to 2, got 3"):
        replace(CONFIG, arch=replace(CONFIG.arch, image_encoder=Encoder(3, 16, 2, 3)))
    with pytest.raises(ValueError, match=r"three even axes.*got 8 of \(1, 3, 3\)"):
        replace(CONFIG, rotary_pos_embed=True)


def test_other_frame_sizes_have_the_same_weights() -> None:
    config = CONFIG.resized(64, 96)
    assert config.image_grid == (4, 6) and config.video_grid == (2, 3)
    assert config.video_base_size == (2, 2, 3) and config.latent_size == (8, 12)
    NovaTransformer(config).load_state_dict(NovaTransformer(CONFIG).state_dict())
    stride_16 = replace(CONFIG, image_stride=16, image_size=(32, 64))
    assert (stride_16.patch, stride_16.video_patch, stride_16.image_grid) == (1, 2, (2, 4))


def state(raw: dict = RAW) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return NovaTransformer(NovaConfig.from_dict(raw)).state_dict()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    path, half = tmp_path / f"diffusion_pytorch_model.{suffix}", torch.float16
    stored = {key: x.to(half) for key, x in state().items()}
    save_file(stored, path) if suffix == "safetensors" else torch.save(stored, path)
    model = load_pretrained(tmp_path, FUSED)
    assert model.ops is FUSED and model.config == NovaConfig.from_dict(RAW)
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(x, stored[key]) and x.dtype == half for key, x in loaded.items())

    other = load_pretrained(tmp_path, size=(64, 64), spatial_attention="set_causal")
    assert other.config.image_grid == (4, 4)
    assert other.config.spatial_attention == "set_causal"


def test_keys_that_do_not_fit() -> None:
    tensors = state()
    dropped = {key: x for key, x in tensors.items() if "mixer" not in key}
    with pytest.raises(ValueError, match=r"3 missing: video_encoder\.mixer\.lora\.weight"):
        load_transformer(RAW, dropped)
    with pytest.raises(ValueError, match="1 left over: surprise"):
        load_transformer(RAW, tensors | {"surprise": torch.ones(1)})
    with pytest.raises(ValueError, match=r"mask_token of shape \[1, 16\], got \[3\]"):
        load_transformer(RAW, tensors | {"mask_embed.mask_token": torch.ones(3)})


def test_what_a_config_decides() -> None:
    """Only models of videos have motion, only those without rotary positions learned times."""
    plain = state().keys()
    image = {**RAW, "video_base_size": [1, 1, 2], "video_mixer_rank": None}
    assert {key.split(".")[0] for key in plain - state(image).keys()} == {
        "motion_embed",
        "video_encoder",
    }
    full_rank = state({**RAW, "video_mixer_rank": -1})
    assert full_rank["video_encoder.mixer.proj.weight"].shape == (32, 16)
    assert "video_encoder.mixer.lora.weight" not in full_rank
    labels = state({**image, "text_token_dim": None})
    assert labels["label_embed.weight"].shape == (1001, 16)
