"""The causal video VAE: recorded numbers, chunks of time, tiles of space, weights, gradients."""

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.kernels.contracts import PeakMemory
from tests.paths import GOLDEN
from vidgen.commands import verify
from vidgen.common.checkpoint import read_state_dict
from vidgen.common.media import to_uint8
from vidgen.pyramid_flow.vae.config import FIXED, RELEASED, VAEConfig
from vidgen.pyramid_flow.vae.latents import LATENT_STATS, denormalize_latents, normalize_latents
from vidgen.pyramid_flow.vae.tiling import decode_tiling, encode_tiling, run_tiled
from vidgen.pyramid_flow.vae.vae import CausalVideoVAE, Posterior
from vidgen.pyramid_flow.vae.weights import load_pretrained_vae, load_vae

pytestmark = pytest.mark.portable_only  # no kernel of ours is in it

CASE = GOLDEN / "pyramid_flow" / "vae.json"
TINY = {
    "encoder_out_channels": 2,
    "decoder_in_channels": 2,
    "encoder_block_out_channels": [2, 4, 4, 6],
    "decoder_block_out_channels": [2, 4, 6, 6],
    "encoder_layers_per_block": [1, 2, 1, 1],
    "decoder_layers_per_block": [1, 1, 2, 1],
    "encoder_norm_num_groups": 2,
    "decoder_norm_num_groups": 2,
}


@pytest.fixture
def vae() -> CausalVideoVAE:
    """A small model in fp64, with other sizes than the recorded case."""
    model = CausalVideoVAE.from_config(TINY).double()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def video(n_frames: int, height: int = 16, width: int = 8, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, n_frames, height, width, dtype=torch.float64) * 2 - 1


def latents(n_frames: int, height: int = 2, width: int = 1, batch: int = 1) -> Tensor:
    return torch.randn(batch, 2, n_frames, height, width, dtype=torch.float64)


def join(chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(chunks), dim=2)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal in fp64 except for rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


# ---- recorded numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_recorded_case(dtype: torch.dtype) -> None:
    case = next(c for c in verify.find_cases(CASE.parent) if c.kind == "vae")
    outcome = verify.check(case, "fused", dtype, "cpu")
    assert outcome.status == "PASS", outcome
    if dtype.itemsize >= 4:
        assert outcome.error is not None and outcome.error < 1e-5


@pytest.mark.parametrize("grad", [True, False])
def test_windows_agree_in_fp32(grad: bool) -> None:
    tensors = load_file(CASE.with_suffix(".safetensors"))
    weights = {k.removeprefix("w."): x for k, x in tensors.items() if k.startswith("w.")}
    model = load_vae(json.loads(CASE.read_text())["config"], weights)
    z, x = tensors["in.z"], tensors["in.video"]
    with torch.set_grad_enabled(grad):
        for window in (1, 2, 3):
            error = (model.decode(z, window=window) - model.decode(z)).abs().max()
            assert error <= 5e-6
        for window in (8, 16):
            error = (model.encode(x, window=window).moments - model.encode(x).moments).abs().max()
            assert error <= 5e-6


# ---- shapes and laws


@pytest.mark.parametrize("height, width", [(8, 8), (24, 40), (20, 9)])
@pytest.mark.parametrize("n_frames", [1, 9, 17])
def test_shapes(vae: CausalVideoVAE, n_frames: int, height: int, width: int) -> None:
    x = video(n_frames, height, width, batch=2)
    with torch.no_grad():
        z = vae.encode(x).mode()
        assert z.shape == (2, 2, (n_frames - 1) // 8 + 1, -(-height // 8), -(-width // 8))
        y = vae.decode(z)
    assert y.shape == (2, 3, n_frames, z.shape[3] * 8, z.shape[4] * 8)


def test_no_videos(vae: CausalVideoVAE) -> None:
    assert vae.encode(video(9, batch=0)).mean.shape == (0, 2, 2, 2, 1)
    assert vae.decode(latents(2, batch=0), window=1).shape == (0, 3, 9, 16, 8)


def test_rows_of_a_batch_and_strides_do_not_matter(vae: CausalVideoVAE) -> None:
    x = video(9, batch=2)
    moments = vae.encode(x).moments
    assert_same(vae.encode(x[1:]).moments, moments[1:])
    strided = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert_same(vae.encode(strided).moments, moments)
    z = latents(3, batch=2)
    assert_same(vae.decode(z.mT.contiguous().mT), vae.decode(z))


def test_the_future_does_not_matter(vae: CausalVideoVAE) -> None:
    x, z = video(17), latents(3)
    past = vae.encode(x[:, :, :9]).moments
    assert_same(vae.encode(x).moments[:, :, :2], past)
    assert_same(vae.decode(z)[:, :, :9], vae.decode(z[:, :, :2]))
    assert_same(vae.decode(z)[:, :, :1], vae.decode(z[:, :, :1]))


def test_inputs_are_not_written(vae: CausalVideoVAE) -> None:
    x, z = video(9, 40, 40), latents(2, 5, 5)
    kept = x.clone(), z.clone()
    with torch.no_grad():
        vae.encode(x, window=8, tile=32)
        vae.decode(z, window=1, tile=32)
    assert torch.equal(x, kept[0]) and torch.equal(z, kept[1])


# ---- chunks of time


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("n_frames", [1, 9, 17, 41])
def test_chunks_are_exact(vae: CausalVideoVAE, n_frames: int, grad: bool) -> None:
    x, z = video(n_frames), latents((n_frames + 7) // 8)
    with torch.set_grad_enabled(grad):
        moments, y = vae.encode(x).moments, vae.decode(z)
        for window in (8, 16, 24):
            assert_same(vae.encode(x, window=window).moments, moments)
            assert_same(join(p.moments for p in vae.encode_chunks(x, window=window)), moments)
        for window in (1, 2, 3):
            assert_same(vae.decode(z, window=window), y)
            assert_same(join(vae.decode_chunks(z, window=window)), y)


def test_chunks_as_they_come(vae: CausalVideoVAE) -> None:
    """Chunks may have any lengths, and are taken from an iterator one by one."""
    x, z = video(41), latents(6)
    asked = []

    def parts(whole: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        for part in whole.split(lengths, dim=2):
            asked.append(part.shape[2])
            yield part

    frames = vae.decode_chunks(parts(z, [1, 3, 2]))
    assert not asked
    first = next(frames)
    assert (asked, first.shape[2]) == ([1], 1)
    assert_same(join(iter([first, *frames])), vae.decode(z))
    moments = join(p.moments for p in vae.encode_chunks(parts(x, [1, 8, 32])))
    assert_same(moments, vae.encode(x).moments)


def test_streams_interleave(vae: CausalVideoVAE) -> None:
    a, b = latents(4), latents(4, batch=2)
    pairs = zip_longest(vae.decode_chunks(a, window=1), vae.decode_chunks(b, window=1))
    frames_a, frames_b = zip(*pairs, strict=True)
    assert_same(torch.cat(frames_a, dim=2), vae.decode(a))
    assert_same(torch.cat(frames_b, dim=2), vae.decode(b))


@pytest.mark.parametrize("tile", [None, 32])
def test_memory_does_not_grow_with_the_video(vae: CausalVideoVAE, tile: int | None) -> None:
    def peaks(n_latents: int) -> tuple[int, int]:
        with torch.no_grad(), PeakMemory() as decoding:
            chunks = (torch.zeros(1, 2, 1, 5, 4).double() for _ in range(n_latents))
            for _ in vae.decode_chunks(chunks, tile=tile):
                pass
        with torch.no_grad(), PeakMemory() as encoding:
            chunks = (video(8 if i else 1, 40, 32) for i in range(n_latents))
            for _ in vae.encode_chunks(chunks, tile=tile):
                pass
        return decoding.peak, encoding.peak

    assert peaks(3) == peaks(6)
    with torch.no_grad(), PeakMemory() as whole:
        vae.decode(latents(6, 5, 4), tile=tile)
    assert peaks(3)[0] < whole.peak / 2


def test_less_memory_without_gradients(
    vae: CausalVideoVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalised inputs are written frame by frame into the input of the convolution."""
    z = latents(3, 4, 4)
    with torch.no_grad(), PeakMemory() as ours:
        y = vae.decode(z)

    def plainly(past: Tensor, x: Tensor, norm) -> Tensor:
        return torch.cat([past, x if norm is None else F.silu(norm(x))], dim=2)

    monkeypatch.setattr("vidgen.pyramid_flow.vae.layers._append", plainly)
    with torch.no_grad(), PeakMemory() as plain:
        assert_same(vae.decode(z), y)
    assert ours.peak < 0.9 * plain.peak


# ---- tiles of space


def blend_by_loops(tiles: list[list[Tensor]], blend: int, keep: int) -> Tensor:
    """Blends and joins tiles by the definition, one row or column at a time."""
    rows = []
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            if i > 0:
                above = tiles[i - 1][j]
                n = min(blend, above.shape[3], tile.shape[3])
                for y in range(n):
                    old = above[:, :, :, above.shape[3] - n + y]
                    tile[:, :, :, y] = old * (1 - y / n) + tile[:, :, :, y] * (y / n)
            if j > 0:
                left = row[j - 1]
                n = min(blend, left.shape[4], tile.shape[4])
                for x in range(n):
                    old = left[..., left.shape[4] - n + x]
                    tile[..., x] = old * (1 - x / n) + tile[..., x] * (x / n)
        rows.append(torch.cat([tile[..., :keep, :keep] for tile in row], dim=4))
    return torch.cat(rows, dim=3)


@pytest.mark.parametrize("height, width", [(5, 4), (4, 6), (7, 10), (12, 3)])
def test_decoding_in_tiles(vae: CausalVideoVAE, height: int, width: int) -> None:
    z = latents(2, height, width)
    with torch.no_grad():
        y = vae.decode(z, tile=32)
        tiles = [
            [vae.decode(z[..., i : i + 4, j : j + 4]) for j in range(0, width, 3)]
            for i in range(0, height, 3)
        ]
    assert y.shape[3:] == (8 * height, 8 * width)
    assert_same(y, blend_by_loops(tiles, blend=8, keep=24))
    with torch.no_grad():
        assert_same(vae.decode(z, tile=32, window=1), y)
        assert_same(join(vae.decode_chunks(z, tile=32, window=1)), y)


@pytest.mark.parametrize("height, width", [(40, 32), (57, 70), (25, 33)])
def test_encoding_in_tiles(vae: CausalVideoVAE, height: int, width: int) -> None:
    x = video(9, height, width)
    with torch.no_grad():
        moments = vae.encode(x, tile=32).moments
        tiles = [
            [vae.encode(x[..., i : i + 32, j : j + 32]).moments for j in range(0, width, 24)]
            for i in range(0, height, 24)
        ]
    assert moments.shape[3:] == (-(-height // 8), -(-width // 8))
    assert_same(moments, blend_by_loops(tiles, blend=1, keep=3))
    with torch.no_grad():
        assert_same(vae.encode(x, tile=32, window=8).moments, moments)
        chunks = vae.encode_chunks(x, tile=32, window=8)
        assert_same(join(p.moments for p in chunks), moments)


def test_one_tile_is_no_tiling(vae: CausalVideoVAE) -> None:
    z = latents(1, 4, 4)
    assert torch.equal(vae.decode(z, tile=32), vae.decode(z))


@pytest.mark.parametrize("tiling", [encode_tiling(64, 8), decode_tiling(64, 8)])
def test_tiles_of_one_image_give_it_back(tiling) -> None:
    """Blending tiles of one image gives that image."""
    x = torch.randn(1, 1, 1, 180, 150, dtype=torch.float64)
    tiling = tiling._replace(size=64, stride=48, blend=16, keep=48)
    assert_same(run_tiled(x, tiling, lambda tile, _: tile.clone()), x)


# ---- gradients


def test_gradients(vae: CausalVideoVAE) -> None:
    z, x = latents(2, 1, 1).requires_grad_(), video(9, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(vae.decode, z, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: vae.encode(x).moments, x, fast_mode=True)


def test_gradients_of_weights(vae: CausalVideoVAE) -> None:
    x, step = video(9), 1e-6
    noise = torch.randn_like(vae.encode(x).mean)

    def loss() -> Tensor:
        posterior = vae.encode(x)
        y = vae.decode(posterior.sample(noise=noise))
        return (y - x).square().mean() + 0.1 * posterior.kl().mean()

    parameters = list(vae.parameters())
    grads = torch.autograd.grad(loss(), parameters)
    for (name, _), grad in zip(vae.named_parameters(), grads, strict=True):
        assert grad.abs().max() > 0 or name.endswith("to_k.bias"), name  # softmax ignores that
    directions = [torch.randn_like(p) for p in parameters]
    expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
            values.append(loss())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), expected, rtol=1e-6, atol=0)


def test_gradients_pass_through_chunks_and_tiles(vae: CausalVideoVAE) -> None:
    z = latents(3, 2, 2).requires_grad_()
    weight = vae.decoder.conv_in.conv.weight
    whole = torch.autograd.grad(vae.decode(z).square().sum(), (z, weight))
    chunked = torch.autograd.grad(vae.decode(z, window=1).square().sum(), (z, weight))
    for a, b in zip(chunked, whole, strict=True):
        assert_same(a, b)
    z = latents(1, 5, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: vae.decode(z, tile=32), z, fast_mode=True)


def test_forward_is_a_training_step(vae: CausalVideoVAE) -> None:
    x, generator = video(9), torch.Generator().manual_seed(1)
    posterior, y = vae(x, generator)
    assert y.shape == x.shape
    assert_same(vae.decode(posterior.sample(generator.manual_seed(1))), y)


# ---- other ways to run it


def test_autocast(vae: CausalVideoVAE) -> None:
    vae, z, x = vae.float(), latents(3).float(), video(17).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, moments = vae.decode(z), vae.encode(x).moments
        with torch.no_grad():
            assert torch.equal(vae.decode(z, window=1), y)
            assert torch.equal(vae.encode(x, window=8).moments, moments)
    assert y.dtype == moments.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), vae.decode(z), rtol=0.05, atol=0.1)


def test_compiles_to_one_graph(vae: CausalVideoVAE) -> None:
    z = latents(2)
    decode = torch.compile(vae.decode, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(decode(z, window=1), vae.decode(z))


# ---- the posterior, latents, pixels


def test_posterior() -> None:
    moments = torch.randn(2, 6, 1, 2, 2)
    moments[:, 3, 0, 0, 0], moments[:, 4, 0, 0, 0] = 100, -100
    posterior = Posterior(moments)
    assert torch.equal(posterior.mode(), moments[:, :3])
    assert posterior.logvar.max() == 20 and posterior.logvar.min() == -30
    noise = torch.randn(2, 3, 1, 2, 2)
    expected = moments[:, :3] + (moments[:, 3:].clamp(-30, 20) / 2).exp() * noise
    torch.testing.assert_close(posterior.sample(noise=noise), expected)
    samples = [posterior.sample(torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*samples) and not torch.equal(samples[0], posterior.sample())
    normal = torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), kl.flatten(1).sum(1))
    with pytest.raises(ValueError, match=r"noise: expected \[2, 3, 1, 2, 2\], got \[3\]"):
        posterior.sample(noise=torch.zeros(3))


@pytest.mark.parametrize("name", sorted(LATENT_STATS))
def test_latents_are_normalised_and_back(name: str) -> None:
    stats = LATENT_STATS[name]
    z = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    kept = z.clone()
    x = normalize_latents(z, stats)
    shift, divisor = {"pyramid_flux": (-0.04, 1.8726), "pyramid_mmdit": (0.1490, 1.8415)}[name]
    assert_same(x[:, :, :1], (z[:, :, :1] - shift) / divisor)
    assert_same(x[:, :, 1:], (z[:, :, 1:] + 0.2343) / 3.0986)
    assert_same(denormalize_latents(x, stats), z)
    assert torch.equal(z, kept)
    parts = [normalize_latents(part, stats, start=t) for t, part in enumerate(z.split(1, dim=2))]
    assert torch.equal(torch.cat(parts, dim=2), x)
    assert_same(denormalize_latents(x[:, :, 1:], stats, start=1), z[:, :, 1:])
    assert normalize_latents(z.bfloat16(), stats).dtype == torch.bfloat16
    for function in (normalize_latents, denormalize_latents):
        with pytest.raises(ValueError, match="start: expected a frame index"):
            function(z, stats, start=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pixels(dtype: torch.dtype) -> None:
    x = torch.tensor([-2.0, -1.0, -0.995, 0.0, 0.5, 1.0, 7.0], dtype=dtype)
    expected = [0, 0, 0, 127, 191, 255, 255]
    pixels = to_uint8(x[None, None, :, None, None].expand(2, 3, 7, 5, 4), rounded=False)
    assert pixels.shape == (2, 7, 5, 4, 3) and pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert pixels[1, :, 4, 3, 2].tolist() == expected


# ---- configs and weights


def test_released_model() -> None:
    with torch.device("meta"):
        model = CausalVideoVAE()
    shapes = {key: list(x.shape) for key, x in model.state_dict().items()}
    assert shapes == released_shapes() and len(shapes) == 260
    counts = [sum(p.numel() for p in m.parameters()) for m in (model.encoder, model.decoder)]
    assert [round(n / 1e6, 2) for n in counts] == [109.63, 225.77]


def released_shapes() -> dict[str, list[int]]:
    """The keys and shapes of the released checkpoint, from its description."""
    shapes: dict[str, list[int]] = {}

    def add(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = list(weight), [weight[0]]

    def conv(name: str, out: int, into: int, kernel: int = 3) -> None:
        add(f"{name}.conv", out, into, kernel, kernel, kernel)

    def resnets(name: str, out: int, into: int, n: int) -> None:
        for i in range(n):
            a = out if i else into
            add(f"{name}.resnets.{i}.norm1", a)
            conv(f"{name}.resnets.{i}.conv1", out, a)
            add(f"{name}.resnets.{i}.norm2", out)
            conv(f"{name}.resnets.{i}.conv2", out, out)
            if a != out:
                conv(f"{name}.resnets.{i}.conv_shortcut", out, a, 1)

    def ends(name: str, c: int, into: int, c_out: int, out: int) -> None:
        conv(f"{name}.conv_in", c, into)
        add(f"{name}.conv_norm_out", c_out)
        conv(f"{name}.conv_out", out, c_out)
        resnets(f"{name}.mid_block", 512, 512, 2)
        add(f"{name}.mid_block.attentions.0.group_norm", 512)
        for linear in ("to_q", "to_k", "to_v", "to_out.0"):
            add(f"{name}.mid_block.attentions.0.{linear}", 512, 512)

    ends("encoder", 128, 3, 512, 32)
    for i, (into, c) in enumerate([(128, 128), (128, 256), (256, 512), (512, 512)]):
        resnets(f"encoder.down_blocks.{i}", c, into, 2)
        if i < 3:
            conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", c, c)
            conv(f"encoder.down_blocks.{i}.temporal_downsamplers.0.conv", c, c)
    ends("decoder", 512, 16, 128, 3)
    for i, (into, c) in enumerate([(512, 512), (512, 512), (512, 256), (256, 128)]):
        resnets(f"decoder.up_blocks.{i}", c, into, 3)
        if i < 3:
            conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", 4 * c, c)
            conv(f"decoder.up_blocks.{i}.temporal_upsamplers.0.conv", 2 * c, c)
    conv("quant_conv", 32, 32, 1)
    conv("post_quant_conv", 16, 16, 1)
    return shapes


RELEASED_JSON = {
    "_class_name": "CausalVideoVAE",
    "_diffusers_version": "0.29.2",
    "add_post_quant_conv": True,
    "decoder_act_fn": "silu",
    "decoder_block_dropout": [0.0, 0.0, 0.0, 0.0],
    "decoder_block_out_channels": [128, 256, 512, 512],
    "decoder_in_channels": 16,
    "decoder_layers_per_block": [3, 3, 3, 3],
    "decoder_norm_num_groups": 32,
    "decoder_out_channels": 3,
    "decoder_spatial_up_sample": [True, True, True, False],
    "decoder_temporal_up_sample": [True, True, True, False],
    "decoder_type": "causal_vae_conv",
    "decoder_up_block_types": ["UpDecoderBlockCausal3D"] * 4,
    "downsample_scale": 8,
    "encoder_act_fn": "silu",
    "encoder_block_dropout": [0.0, 0.0, 0.0, 0.0],
    "encoder_block_out_channels": [128, 256, 512, 512],
    "encoder_double_z": True,
    "encoder_down_block_types": ["DownEncoderBlockCausal3D"] * 4,
    "encoder_in_channels": 3,
    "encoder_layers_per_block": [2, 2, 2, 2],
    "encoder_norm_num_groups": 32,
    "encoder_out_channels": 16,
    "encoder_spatial_down_sample": [True, True, True, False],
    "encoder_temporal_down_sample": [True, True, True, False],
    "encoder_type": "causal_vae_conv",
    "interpolate": False,
    "sample_size": 256,
    "scaling_factor": 0.13025,
}


def test_released_config() -> None:
    assert VAEConfig.from_dict(RELEASED_JSON) == RELEASED
    assert (RELEASED.spatial_factor, RELEASED.temporal_factor) == (8, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention_window": 4}, "config: attention_window is not known, got 4"),
        ({"interpolate": True}, "interpolate: expected False, got True"),
        ({"encoder_act_fn": "relu"}, "encoder_act_fn: expected 'silu', got 'relu'"),
        ({"decoder_block_dropout": [0.0, 0.1]}, "decoder_block_dropout: expected 0.0"),
        ({"encoder_down_block_types": ["DownEncoderBlock2D"]}, "DownEncoderBlockCausal3D"),
        ({"_class_name": "AutoencoderKL"}, "_class_name: expected 'CausalVideoVAE'"),
        ({"downsample_scale": 4}, "downsample_scale: expected 8, .* got 4"),
        ({"decoder_in_channels": 8}, "decoder_in_channels: expected encoder_out_channels = 16"),
        ({"encoder_layers_per_block": [2]}, "levels: expected as many entries in each"),
        ({"decoder_norm_num_groups": 48}, "expected multiples of decoder_norm_num_groups = 48"),
        ({"decoder_temporal_up_sample": [True] * 4}, r"halves, \(3, 3\), got \(3, 4\)"),
    ],
)
def test_other_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict(RELEASED_JSON | change)


@pytest.mark.parametrize("key", sorted(FIXED))
def test_nothing_that_changes_results_is_ignored(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: expected"):
        VAEConfig.from_dict({key: "something else"})


def test_levels_of_other_factors() -> None:
    """A VAE of factor 4 in space and 2 in time."""
    levels = {"spatial": [True, False, True], "temporal": [False, True, False]}
    config = {"encoder_out_channels": 2, "decoder_in_channels": 2}
    for side, way in (("encoder", "down"), ("decoder", "up")):
        config |= {f"{side}_{name}_{way}_sample": flags for name, flags in levels.items()}
        config |= {f"{side}_block_out_channels": [2, 4, 4], f"{side}_layers_per_block": [1, 1, 1]}
        config |= {f"{side}_norm_num_groups": 2}
    model = CausalVideoVAE.from_config(config | {"downsample_scale": 4})
    z = model.encode(torch.randn(1, 3, 5, 8, 12)).mode()
    assert z.shape == (1, 2, 3, 2, 3) and model.decode(z).shape == (1, 3, 5, 8, 12)
    torch.testing.assert_close(model.decode(z, window=1), model.decode(z))


def test_weights_from_files(vae: CausalVideoVAE, tmp_path: Path) -> None:
    state = vae.state_dict()
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    training = {f"vae.{key}": x for key, x in state.items()} | {"loss.logvar": torch.zeros(1)}
    torch.save({"model": training, "epoch": 3}, tmp_path / "checkpoint.pth")
    checkpoint = read_state_dict(tmp_path / "checkpoint.pth", within="model")
    z = latents(2)
    for model in (load_pretrained_vae(tmp_path), load_vae(TINY, checkpoint)):
        assert torch.equal(model.decode(z), vae.decode(z))


def test_wrong_weights_are_refused(vae: CausalVideoVAE) -> None:
    state = dict(vae.state_dict())
    bias = state.pop("encoder.conv_in.conv.bias")
    with pytest.raises(ValueError, match=r"1 missing: encoder\.conv_in\.conv\.bias"):
        load_vae(TINY, state)
    with pytest.raises(ValueError, match="1 left over: other"):
        load_vae(TINY, state | {"encoder.conv_in.conv.bias": bias, "other": bias})
    with pytest.raises(ValueError, match=r"of shape \[2\], got \[3\]"):
        load_vae(TINY, state | {"encoder.conv_in.conv.bias": torch.zeros(3)})


# ---- what is refused


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(1, 3, 8, 16, 16), r"video: expected 8 k \+ 1 frames, got 8"),
        (torch.zeros(1, 4, 9, 16, 16), r"\[B, 3, frames, height, width\].* got \[1, 4, 9"),
        (torch.zeros(3, 9, 16, 16), r"video: expected \[B, 3, .* got \[3, 9, 16, 16\]"),
        (torch.zeros(1, 3, 9, 0, 16), r"none of them 0, got \[1, 3, 9, 0, 16\]"),
        (torch.zeros(1, 3, 9, 16, 16, dtype=torch.uint8), "floating-point dtype, got torch.uint8"),
    ],
)
def test_videos_that_are_refused(vae: CausalVideoVAE, x: Tensor, message: str) -> None:
    for call in (vae.encode, vae.encode_chunks):
        with pytest.raises(ValueError, match=message):
            call(x)
    with pytest.raises(ValueError, match=message):
        next(vae.encode_chunks(iter([x])))


def test_latents_windows_and_tiles_that_are_refused(vae: CausalVideoVAE) -> None:
    z, x = latents(2), video(9)
    for decode in (vae.decode, vae.decode_chunks):
        with pytest.raises(ValueError, match=r"latents: expected \[B, 2, frames, .* got \[1, 3"):
            decode(x)
        with pytest.raises(ValueError, match="window: expected a positive multiple of 1, got 0"):
            decode(z, window=0)
        with pytest.raises(ValueError, match="tile: expected a multiple of 32 pixels, got 40"):
            decode(z, tile=40)
    for encode in (vae.encode, vae.encode_chunks):
        with pytest.raises(ValueError, match="window: expected a positive multiple of 8, got 4"):
            encode(x, window=4)
        with pytest.raises(ValueError, match="tile: expected a multiple of 32 pixels, got 0"):
            encode(x, tile=0)
    with pytest.raises(ValueError, match="video: expected a multiple of 8 frames, got 9"):
        list(vae.encode_chunks([x, x]))
    with pytest.raises(ValueError, match=r"batch and frame size of \[1, 2, 2, 2, 1\]"):
        list(vae.decode_chunks([z, latents(1, 3, 1)]))
