"""NOVA's VAEs: recorded numbers, tiles of time, both behind one interface, weights, gradients."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.kernels.contracts import PeakMemory
from tests.paths import GOLDEN
from vidgen.commands import verify
from vidgen.common.media import to_uint8
from vidgen.nova.checks.golden_vae import complete_latents
from vidgen.nova.vae import layers
from vidgen.nova.vae.config import FIXED, VAEConfig
from vidgen.nova.vae.layers import CausalConv3d, FrameConv, Upsample
from vidgen.nova.vae.vae import VAE, ImageVAE, VideoVAE, load_pretrained_vae, load_vae, time_tiles

pytestmark = pytest.mark.portable_only  # no kernel of ours is in it

CASES = GOLDEN / "nova"
TINY = {
    "block_out_channels": [2, 4, 6, 4],
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 2,
    "scaling_factor": 0.3,
}
TINY_IMAGE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [2, 4],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 2,
    "norm_num_groups": 2,
    "scaling_factor": 0.13025,
}


def randomized(model: torch.nn.Module) -> Any:
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.fixture
def vae() -> VideoVAE:
    """Of small sizes that are not those of the recorded case, in fp64."""
    return randomized(VideoVAE(VAEConfig.from_dict(TINY)))


@pytest.fixture
def image_vae() -> ImageVAE:
    from diffusers import AutoencoderKL

    model: Any = AutoencoderKL.from_config(TINY_IMAGE)
    return ImageVAE(randomized(model))


def video(n_frames: int, height: int = 16, width: int = 8, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, n_frames, height, width, dtype=torch.float64) * 2 - 1


def latents(n_frames: int, height: int = 2, width: int = 1, batch: int = 1) -> Tensor:
    return torch.randn(batch, 2, n_frames, height, width, dtype=torch.float64)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, in fp64."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


# ---- recorded numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recorded_case(dtype: torch.dtype) -> None:
    case = next(c for c in verify.find_cases(CASES) if c.kind == "vae_opensora")
    outcome = verify.check(case, "fused", dtype, "cpu")
    assert outcome.status == "PASS", outcome
    assert outcome.error is not None and outcome.error < 5e-5  # of values up to 7, recorded in fp32


# ---- layers against their definitions


@pytest.mark.parametrize("n_frames", [1, 2, 5])
def test_causal_convolution(n_frames: int) -> None:
    """Copies of the first frame before it, zeros around: all around, or to the end for stride 2."""
    x = video(n_frames, 6, 4)
    conv = CausalConv3d(3, 2).double()
    padded = F.pad(F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate"), (1, 1, 1, 1))
    assert_same(conv(x), F.conv3d(padded, conv.weight, conv.bias))
    conv = CausalConv3d(3, 2, stride=2).double()
    padded = F.pad(F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate"), (0, 1, 0, 1))
    assert_same(conv(x), F.conv3d(padded, conv.weight, conv.bias, stride=2))
    conv = CausalConv3d(3, 2, kernel=(1, 3, 3)).double()
    assert_same(conv(x), F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1)))


def test_convolution_of_frames() -> None:
    x = video(3, 6, 4, batch=2)
    for stride, padding in ((1, (1, 1, 1, 1)), (2, (0, 1, 0, 1))):
        conv = FrameConv(3, 2, stride=stride).double()
        y = conv(x)
        for t in range(3):
            frame = F.pad(x[:, :, t], padding)
            assert_same(y[:, :, t], F.conv2d(frame, conv.weight, conv.bias, stride=stride))


def test_upsampling_in_time() -> None:
    """Between two frames, a quarter and three quarters of the way; the first stands alone."""
    layer = Upsample(1, in_time=True).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.zero_()
    layer.conv.weight[0, 0, 2, 1, 1] = 1  # the present
    x = torch.tensor([7.0, 1.0, 5.0]).double()[None, None, :, None, None].expand(1, 1, 3, 2, 2)
    y = layer(x)
    assert y.shape == (1, 1, 5, 4, 4)
    assert_same(y[0, 0, :, 0, 0], torch.tensor([7.0, 1.0, 2.0, 4.0, 5.0]).double())
    assert layer(x[:, :, :1]).shape == (1, 1, 1, 4, 4)


@pytest.mark.parametrize("width, groups", [(4, 2), (24, 24), (20, 10), (36, 12)])
def test_parts_of_the_channels_are_normalised_alike(width: int, groups: int) -> None:
    """Without gradients, where that takes less memory."""
    conv, norm = CausalConv3d(width, 2).double(), torch.nn.GroupNorm(groups, width).double()
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter)
    x = torch.randn(2, width, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        y = conv(x, norm)
    assert_same(y, conv(x, norm))


# ---- shapes and laws


@pytest.mark.parametrize("height, width", [(8, 8), (24, 40)])
@pytest.mark.parametrize("n_latents", [1, 2, 5, 6])
def test_shapes(vae: VideoVAE, n_latents: int, height: int, width: int) -> None:
    n_frames = vae.latents_to_frames(n_latents)
    with torch.no_grad():
        z = vae.encode(video(n_frames, height, width, batch=2))
        assert z.shape == (2, 2, n_latents, height // 8, width // 8)
        assert vae.decode(z).shape == (2, 3, n_frames, height, width)


def test_rows_of_a_batch_and_strides_do_not_matter(vae: VideoVAE) -> None:
    x = video(9, batch=2)
    moments = vae.posterior(x).moments
    assert_same(vae.posterior(x[1:]).moments, moments[1:])
    strided = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert_same(vae.posterior(strided).moments, moments)
    z = latents(3, batch=2)
    assert_same(vae.decode(z.mT.contiguous().mT), vae.decode(z))


def test_inputs_are_not_written(vae: VideoVAE) -> None:
    x, z = video(21), latents(6)
    kept = x.clone(), z.clone()
    with torch.no_grad():
        vae.encode(x)
        vae.decode(z)
    assert torch.equal(x, kept[0]) and torch.equal(z, kept[1])


def test_scaled_latents(vae: VideoVAE) -> None:
    x, noise = video(5), torch.randn(1, 2, 2, 2, 1, dtype=torch.float64)
    posterior = vae.posterior(x)
    expected = (posterior.mean + (posterior.logvar / 2).exp() * noise) * 0.3
    assert_same(vae.encode(x, noise=noise), expected)
    samples = [vae.encode(x, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*samples)
    z = latents(2)
    assert_same(vae.decode(z * 0.3), vae.decoder(vae.post_quant_conv(z)))


# ---- tiles of time


@pytest.mark.parametrize("n_latents", [*range(1, 11), 13])
def test_tiles_of_latents(vae: VideoVAE, n_latents: int) -> None:
    """Five latents, four more with the last of those before, and so on; the rest is shorter."""
    z = latents(n_latents)
    with torch.no_grad():
        y = vae.decode(z)
        parts = [vae.decode(z[:, :, :5])]
        for begin in range(4, n_latents - 1, 4):
            parts.append(vae.decode(z[:, :, begin : begin + 5])[:, :, 1:])
    assert y.shape[2] == vae.latents_to_frames(n_latents) == 4 * n_latents - 3
    assert_same(y, torch.cat(parts, dim=2))


@pytest.mark.parametrize("n_frames", [1, 17, 21, 29, 33, 37])
def test_tiles_of_frames(vae: VideoVAE, n_frames: int) -> None:
    x = video(n_frames, 8, 8)
    with torch.no_grad():
        moments = vae.posterior(x).moments
        parts = [vae.posterior(x[:, :, :17]).moments]
        for begin in range(16, n_frames - 1, 16):
            parts.append(vae.posterior(x[:, :, begin : begin + 17]).moments[:, :, 1:])
    assert vae.latents_to_frames(moments.shape[2]) == n_frames
    assert_same(moments, torch.cat(parts, dim=2))


def test_what_the_released_code_drops() -> None:
    counts = {1: 1, 3: 3, 5: 5, 6: 5, 8: 5, 9: 9, 10: 9, 12: 9, 13: 13, 17: 17}
    assert {n: complete_latents(n) for n in counts} == counts


@pytest.mark.parametrize("lengths", [[1] * 7, [3, 1, 3], [7], [5, 2], [6, 1], [1, 6]])
def test_tiles_of_chunks_as_they_come(lengths: list[int]) -> None:
    x = torch.arange(7)[None, None, :, None, None]
    tiles = list(time_tiles(iter(x.split(lengths, dim=2)), 3))
    assert [tile.flatten().tolist() for tile in tiles] == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]


def test_decoding_while_latents_come(vae: VideoVAE) -> None:
    """A tile's frames are there with its last latent, before the next one is asked for."""
    z, asked = latents(8), []

    def sampler() -> Iterator[Tensor]:
        for latent in z.split(1, dim=2):
            asked.append(latent)
            yield latent

    with torch.no_grad():
        frames = vae.decode_chunks(sampler())
        assert not asked
        first = next(frames)
        assert (len(asked), first.shape[2]) == (5, 17)
        assert_same(torch.cat([first, *frames], dim=2), vae.decode(z))


def test_memory_does_not_grow_with_the_video(vae: VideoVAE) -> None:
    def peak(n_latents: int) -> int:
        chunks = (torch.zeros(1, 2, 1, 4, 4).double() for _ in range(n_latents))
        with torch.no_grad(), PeakMemory() as memory:
            for _ in vae.decode_chunks(chunks):
                pass
        return memory.peak

    assert peak(9) == peak(17)
    with torch.no_grad(), PeakMemory() as whole:
        vae.decoder(torch.zeros(1, 2, 17, 4, 4).double())
    assert peak(9) < whole.peak / 2


def test_less_memory_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalised inputs are written part by part, straight to where convolutions read."""
    sizes = TINY | {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 8}
    vae = VideoVAE(VAEConfig.from_dict(sizes))

    def peak() -> int:
        with torch.no_grad(), PeakMemory() as memory:
            vae.decode(torch.zeros(1, 2, 5, 4, 4))
        return memory.peak

    ours = peak()
    monkeypatch.setattr(layers, "NORM_PARTS", 1)
    assert ours < 0.9 * peak()


# ---- images


def test_images_are_coded_by_diffusers(image_vae: ImageVAE) -> None:
    x, noise = video(2, 8, 6, batch=2), torch.randn(2, 2, 2, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        z, y = image_vae.encode(x, noise=noise), image_vae.decode(noise)
        for t in range(2):
            posterior = image_vae.model.encode(x[:, :, t]).latent_dist
            expected = (posterior.mean + posterior.std * noise[:, :, t]) * 0.13025
            assert_same(z[:, :, t], expected)
            assert_same(y[:, :, t], image_vae.model.decode(noise[:, :, t] / 0.13025).sample)
    assert image_vae.latents_to_frames(2) == 2 and image_vae.spatial_factor == 2


def test_what_an_image_model_may_not_ask_for() -> None:
    from diffusers import AutoencoderKL

    model: Any = AutoencoderKL.from_config(TINY_IMAGE | {"shift_factor": 0.1})
    with pytest.raises(ValueError, match=r"shift_factor: expected None, got 0\.1"):
        ImageVAE(model)


def test_pixels_are_truncated() -> None:
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.0079, 0.99, 1.0, 3.0])
    pixels = x[None, :, None, None].expand(3, 8, 1, 1)
    expected = (x.double() * 127.5 + 127.5).clamp(0, 255).floor()
    assert to_uint8(pixels, rounded=False)[:, 0, 0, 1].tolist() == expected.tolist()
    assert to_uint8(pixels)[:, 0, 0, 1].tolist() == [0, 0, 0, 128, 129, 254, 255, 255]


# ---- weights


def test_released_sizes() -> None:
    """Every stage in the kind that the released keys have."""
    with torch.device("meta"):
        model = VideoVAE()
    shapes = {key: list(x.shape) for key, x in model.state_dict().items()}
    recorded = json.loads((CASES / "vae_opensora.json").read_text())["config"]["key_shapes"]
    for key, shape in recorded.items():
        assert len(shapes[key]) == len(shape) and shapes[key][2:] == shape[2:], key
    shortcuts = {key: x for key, x in shapes.items() if key.endswith("conv_shortcut.weight")}
    assert shortcuts == {
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": [256, 128, 1, 1],
        "encoder.down_blocks.2.resnets.0.conv_shortcut.weight": [512, 256, 1, 1, 1],
        "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": [256, 512, 1, 1, 1],
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": [128, 256, 1, 1, 1],
    }
    assert (model.spatial_factor, model.temporal_factor, model.latent_channels) == (8, 4, 4)
    assert model.scaling_factor == 0.18215


@pytest.mark.parametrize("kind", ["video", "image"])
def test_folders(kind: str, vae: VAE, image_vae: VAE, tmp_path: Path) -> None:
    model: Any = {"video": vae, "image": image_vae}[kind]
    config = {"video": TINY, "image": TINY_IMAGE}[kind]
    state = (model if kind == "video" else model.model).state_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_pretrained_vae(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    z = latents(2)
    with torch.no_grad():
        assert torch.equal(loaded.decode(z), model.decode(z))
    del state["encoder.conv_in.bias"]
    with pytest.raises(ValueError, match=r"1 missing: encoder\.conv_in\.bias"):
        load_vae(config, state)


def test_configs() -> None:
    full = {
        **FIXED,
        "_diffusers_version": "0.31.0",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 2 + ["DownEncoderBlock3D"] * 2,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock3D"] * 4,
    }
    assert VAEConfig.from_dict(full) == VAEConfig()
    for change, message in (
        ({"down_block_types": ["DownEncoderBlock2D"] * 4}, "down_block_types: expected"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 4}, "up_block_types: expected"),
        ({"shift_factor": 0.5}, r"shift_factor: expected None, got 0\.5"),
        ({"depth": 3}, "config: depth is not known, got 3"),
        ({"block_out_channels": [32, 48, 32, 32]}, "expected multiples of norm_num_groups = 32"),
        ({"block_out_channels": [32, 32]}, "block_out_channels: expected more than 2 stages"),
    ):
        with pytest.raises(ValueError, match=message):
            VAEConfig.from_dict(full | change)


# ---- what is refused


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(1, 3, 8, 16, 16), r"video: expected 4 k \+ 1 frames, got 8"),
        (torch.zeros(1, 4, 9, 16, 16), r"\[B, 3, frames, height, width\].* got \[1, 4, 9"),
        (torch.zeros(3, 9, 16, 16), r"video: expected \[B, 3, .* got \[3, 9, 16, 16\]"),
        (torch.zeros(1, 3, 9, 0, 16), r"none of them 0, got \[1, 3, 9, 0, 16\]"),
        (torch.zeros(1, 3, 9, 20, 16), "expected multiples of 8 pixels, got 20 x 16"),
        (torch.zeros(1, 3, 9, 16, 16, dtype=torch.uint8), "floating-point dtype, got torch.uint8"),
    ],
)
def test_videos_that_are_refused(vae: VideoVAE, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae.encode(x)


def test_latents_that_are_refused(vae: VideoVAE) -> None:
    for decode in (vae.decode, vae.decode_chunks):
        with pytest.raises(ValueError, match=r"latents: expected \[B, 2, frames, .* got \[1, 3"):
            decode(video(5))
    with pytest.raises(ValueError, match=r"batch and frame size of \[1, 2, 2, 2, 1\]"):
        list(vae.decode_chunks([latents(2), latents(1, 3, 1)]))
    with pytest.raises(ValueError, match="noise: expected"):
        vae.encode(video(5), noise=latents(1))


# ---- gradients


def test_gradients(vae: VideoVAE) -> None:
    z, x = latents(2, 1, 1).requires_grad_(), video(5, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(vae.decode, z, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: vae.posterior(x).moments, x, fast_mode=True)


def test_values_do_not_depend_on_gradients(vae: VideoVAE) -> None:
    x, z = video(9, batch=2), latents(3, batch=2)
    with torch.no_grad():
        moments, y = vae.posterior(x).moments, vae.decode(z)
    assert_same(vae.posterior(x).moments, moments)
    assert_same(vae.decode(z), y)
    loss = vae.posterior(x).moments.square().mean() + vae.decode(z).square().mean()
    loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# ---- other ways to run it


def test_autocast(vae: VideoVAE) -> None:
    vae, z, x = vae.float(), latents(6).float(), video(21).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, moments = vae.decode(z), vae.posterior(x).moments
        with torch.no_grad():
            assert torch.equal(vae.decode(z), y)
            assert torch.equal(vae.posterior(x).moments, moments)
    assert y.dtype == moments.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), vae.decode(z), rtol=0.05, atol=0.1)


def test_compiles_to_one_graph(vae: VideoVAE) -> None:
    z = latents(6)
    decode = torch.compile(vae.decode, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(decode(z), vae.decode(z))
