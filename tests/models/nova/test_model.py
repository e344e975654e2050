"""NOVA's modules: caches and subsets against whole passes, the rule of the sets, golden cases."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.paths import GOLDEN
from vidgen.commands.verify import check, find_cases
from vidgen.nova.checks import golden_models, golden_training
from vidgen.nova.model import set_causal
from vidgen.nova.model.config import Arch, Decoder, Encoder, NovaConfig
from vidgen.nova.model.denoiser import DenoisingMLP
from vidgen.nova.model.embeddings import (
    N_CLASSES,
    grid_positions,
    patchify,
    rotary_positions,
    space_table,
    unpatchify,
)
from vidgen.nova.model.image_encoder import ImageEncoder
from vidgen.nova.model.transformer import NovaTransformer
from vidgen.nova.model.video_encoder import block_causal_mask
from vidgen.nova.model.vit import Block, KVCache, take
from vidgen.ops import EAGER, FUSED, IntervalMask

CASES = GOLDEN / "nova"
CASES = {
    case.path.stem: case
    for case in find_cases(CASES)
    if case.kind in golden_models.KINDS | golden_training.KINDS
}

TINY = NovaConfig(
    image_dim=3,
    image_size=(32, 64),
    text_token_dim=6,
    text_token_len=4,
    video_base_size=(5, 1, 2),
    video_mixer_rank=2,
    arch=Arch(Encoder(2, 24, 2), Encoder(3, 24, 2, 1), Decoder(2, 20)),
)
ROTARY = replace(
    TINY,
    rotary_pos_embed=True,
    video_mixer_rank=-1,
    arch=Arch(Encoder(2, 32, 1), Encoder(3, 32, 1, 2), Decoder(1, 20)),
)
CONFIGS = {"absolute": TINY, "rotary": ROTARY}
every_config = pytest.mark.parametrize("name", CONFIGS)
eager = pytest.param(EAGER, id="eager", marks=pytest.mark.portable_only)
both_ops = pytest.mark.parametrize("ops", [eager, pytest.param(FUSED, id="fused")])


def model_of(config: NovaConfig, ops=EAGER, dtype=torch.float64) -> NovaTransformer:
    """With norms and biases that are not those of a fresh model."""
    torch.manual_seed(0)
    model = NovaTransformer(config, ops).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def normal(*shape: int, seed: int = 1, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orders(n_rows: int, n_tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_rows, n_tokens, generator=generator).argsort(dim=1)


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.portable_only
def test_tables_by_their_definition() -> None:
    width, grid = 8, (2, 3)
    table = space_table(width, grid, torch.device("cpu"), torch.float32)
    for row in range(2):
        for col in range(3):
            f = [1.0, 0.01]  # 10000^(-i / 2)
            expected = [math.sin(col * x) for x in f] + [math.cos(col * x) for x in f]
            expected += [math.sin(row * x) for x in f] + [math.cos(row * x) for x in f]
            torch.testing.assert_close(table[3 * row + col], torch.tensor(expected))
    positions = rotary_positions(range(3, 5), grid, torch.device("cpu"), torch.float32)
    assert positions[4].tolist() == [3, 1, 1] and positions[-1].tolist() == [4, 1, 2]
    assert torch.equal(positions[:6, 1:], grid_positions(grid))
    video = model_of(TINY).video_pos_embed
    assert video is not None
    torch.testing.assert_close(video.times(9), torch.arange(9) * 5 / 9)  # stretched


@pytest.mark.portable_only
def test_patches() -> None:
    x = normal(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert_same(unpatchify(tokens, 2, (2, 3)), x)
    # token 4 is at row 1, column 1: patch row, patch column, channel
    assert_same(tokens[1, 4].view(2, 2, 3), x[1, :, 2:4, 2:4].permute(1, 2, 0))
    embed = model_of(TINY).image_encoder.patch_embed
    assert_same(embed.of_tokens(tokens), embed(x))


@pytest.mark.portable_only
def test_conditions() -> None:
    model = model_of(TINY)
    text = model.text_embed
    assert text is not None
    features = normal(2, 6)
    padded = text.fill_up([features, features[:0]])
    assert_same(padded[0, :2], features)
    assert_same(padded[0, 2:], text.weight[2:4])
    assert_same(padded[1], text.weight[:4])
    usual = model.condition(padded)
    assert usual.shape == (2, TINY.n_condition, 24)
    flow, fps = torch.tensor([5.0, 5.0]), torch.tensor([12.0, 12.0])
    assert_same(model.condition([features, features[:0]], flow=flow, fps=fps), usual)
    with pytest.raises(ValueError, match=r"features: expected shape \[0 to 4, 6\], got \[5, 6\]"):
        model.condition([normal(5, 6)])
    with pytest.raises(ValueError, match="text: expected features and no labels, got none"):
        model.condition(labels=torch.tensor([1]))

    image = replace(TINY, text_token_dim=None, video_base_size=(1, 1, 2), video_mixer_rank=None)
    by_class = model_of(image)
    labels = torch.tensor([3, N_CLASSES])
    assert by_class.condition(labels=labels).shape == (2, image.n_condition, 24) == (2, 1, 24)
    assert "label_embed.weight" in by_class.state_dict()
    with pytest.raises(ValueError, match="labels: expected 0 to 1000 alone, got both"):
        by_class.condition(padded, labels=labels)
    with pytest.raises(ValueError, match="flow, fps: expected None"):
        by_class.condition(labels=labels, flow=flow)


def whole_pass(model: NovaTransformer, x: Tensor, condition: Tensor) -> Tensor:
    """Features of all slots, from one pass under the mask, ``[B, T, Nv, D]``."""
    n_rows, _, n_frames, *_ = x.shape
    slots = model.video_slots(x[:, :, :-1], n_frames, 0, n_rows)
    mask = block_causal_mask(condition.shape[1], slots.shape[2], n_frames, x.device)
    positions = model.video_positions(range(n_frames))
    out = model.video_encoder(slots.flatten(1, 2), condition, mask=mask, positions=positions)
    return out.unflatten(1, (n_frames, -1))


@both_ops
@every_config
@pytest.mark.parametrize("n_frames", [1, 3])
def test_slot_by_slot_is_the_whole_pass(name: str, ops, n_frames: int) -> None:
    model, config = model_of(CONFIGS[name], ops), CONFIGS[name]
    x, condition = normal(2, 3, n_frames, 4, 8), normal(2, 5, config.width)
    expected = whole_pass(model, x, condition)
    capacity = 5 + n_frames * config.n_video_tokens
    cache = model.video_encoder.new_cache(2, capacity)
    with torch.no_grad():
        for t in range(n_frames):
            slot = model.video_slots(x[:, :, t - 1 : t] if t else None, n_frames, t, 2)
            positions = model.video_positions(range(t, t + 1))
            given = condition if t == 0 else None
            out = model.video_encoder(slot[:, 0], given, positions=positions, cache=cache)
            assert_same(out, expected[:, t])
            if t == 0:
                anchor = out
            else:
                mixed = model.video_encoder.mix(anchor, out)
                assert_same(mixed, model.video_encoder.frame_conditions(expected)[:, t])
    assert cache.length == capacity
    with pytest.raises(ValueError, match=f"at most {capacity} tokens, got {capacity + 2}"):
        model.video_encoder(normal(2, 2, config.width), positions=positions, cache=cache)
    cache.clear()
    assert cache.length == 0 and cache.capacity == capacity


@pytest.mark.portable_only
@both_ops
def test_who_sees_whom_in_time(ops) -> None:
    """A slot depends on the condition and the frames before it."""
    model = model_of(TINY, ops)
    x, condition = normal(1, 3, 3, 4, 8).requires_grad_(), normal(1, 5, 24).requires_grad_()
    features = whole_pass(model, x, condition)
    for t in range(3):
        by_x, by_condition = torch.autograd.grad(
            features[:, t].square().sum(), (x, condition), retain_graph=True, allow_unused=True
        )
        assert by_condition.abs().amin() > 0
        seen = [bool(by_x[:, :, s].abs().amax() > 0) for s in range(3)]
        assert seen == [s < t for s in range(3)]


@pytest.mark.portable_only
def test_mixers() -> None:
    features = normal(2, 3, 2, 24)
    none = model_of(replace(TINY, video_mixer_rank=None)).video_encoder
    assert none.frame_conditions(features) is features
    full = model_of(replace(TINY, video_mixer_rank=-1)).video_encoder
    assert full.mixer is not None and full.mixer.lora is None
    assert_same(full.frame_conditions(features)[:, 0], features[:, 0])
    low = model_of(TINY).video_encoder
    assert low.mixer is not None and low.mixer.lora is not None
    change = low.mixer.proj(low.mixer.lora(F.silu(features[:, 2])))
    expected = features[:, 0] * (1 + change[..., :24]) + change[..., 24:]
    assert_same(low.frame_conditions(features)[:, 2], expected)


@both_ops
@every_config
def test_only_the_wanted_tokens(name: str, ops) -> None:
    """The rows of the last layer, and visible tokens in a longer sequence with hidden padding."""
    config = CONFIGS[name]
    encoder = model_of(config, ops).image_encoder
    n_tokens, condition = config.n_tokens, normal(2, 2, config.width)
    tokens, order = normal(2, n_tokens, config.width), orders(2, n_tokens)
    ids, rows = order[:, :3], order[:, 3:5]
    z = encoder(tokens, condition, ids)
    assert_same(encoder(tokens, condition, ids, rows=rows), take(z, rows))

    canvas = encoder.place(tokens)
    padded_ids = torch.cat([ids, torch.full((2, 2), n_tokens)], dim=1)
    visible = torch.cat([take(canvas, ids), normal(2, 2, config.width, seed=9)], dim=1)
    mask = IntervalMask.full([5, 2], [5, 2])
    encoded = encoder.encode(visible, condition, padded_ids, mask=mask)
    assert_same(encoder.decode(encoded, canvas, padded_ids), z)
    nothing = order[:, :0]
    assert encoder(tokens, condition, nothing).shape == tokens.shape


def test_fused_is_eager_with_gradients() -> None:
    """At head dim 96 in fp32, as in the largest model."""
    wide = Arch(Encoder(1, 96, 1), Encoder(2, 96, 1, 1), Decoder(1, 24))
    config = replace(TINY, arch=wide)
    x, condition = normal(1, 3, 2, 4, 8), normal(1, 3, 96)
    order, results = orders(2, config.n_tokens), []
    for ops in (EAGER, FUSED):
        model = model_of(config, ops)
        features = model.video_encoder.frame_conditions(whole_pass(model, x, condition))
        frames = x.transpose(1, 2).flatten(0, 1)
        tokens = model.image_encoder.patch_embed(frames)
        z = model.image_encoder(tokens, features.flatten(0, 1), order[:, :2])
        c = model.image_decoder.embed_condition(z) + model.image_decoder.embed_time(
            torch.tensor([[3.0], [999.0]])
        )
        y = model.image_decoder(patchify(frames, config.patch), c)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)
        results.append([y, *(g for g in grads if g is not None)])
    assert_same(results[1], results[0])


@both_ops
def test_denoising_some_tokens(ops) -> None:
    torch.manual_seed(0)
    model = DenoisingMLP(2, 20, 24, 3, 2, ops).double()
    x, z, t = normal(2, 3, 4, 8), normal(2, 8, 24), torch.tensor([1000.0, 3.0])
    ids = orders(2, 8)[:, :3]
    expected = model.forward_latents(x, t, z)
    tokens, time = patchify(x, 2), model.embed_time(t)[:, None]
    c = model.embed_condition(z) + time
    assert_same(model(tokens, c), expected)
    some = model(take(tokens, ids), take(c, ids))
    assert_same(some, take(expected, ids))
    passed = tokens.scatter(1, ids[..., None].expand_as(some), some)
    assert_same(model.forward_latents(x, t, z, ids), passed)
    # one vector of modulation for all tokens of a row
    same = model.embed_condition(z[:, :1]) + time
    assert_same(model(tokens, same), model(tokens, same.expand(-1, 8, -1)))


def sees(query: tuple[str, int], key: tuple[str, int]) -> bool:
    """The rule of `set_causal`, of tokens by what they are and the set they are in."""
    (kind, i), (of, j) = query, key
    if of == "query":
        return kind == "query" and i == j
    return j < i if kind == "query" else j <= i


def dense_reference(encoder: ImageEncoder, x: dict, order: Tensor, sizes: list[int]) -> Tensor:
    """`predict_all` with one dense mask of the rule for content, queries and condition."""
    n_tokens = order.shape[1]
    sets = [k for k, n in enumerate(sizes, start=1) for _ in range(n)]
    kinds = [("content", 0)] * x["condition"].shape[1] + [("content", k) for k in sets]
    both = kinds + [("query", k) for k in sets]
    mask = torch.tensor([[sees(a, b) for b in both] for a in both])
    content, queries = (take(x[name], order) for name in ("content", "queries"))
    h = torch.cat([x["condition"], content], dim=1)
    for i, block in enumerate(encoder.blocks):
        assert isinstance(block, Block)
        if i == encoder.second_half[0]:
            h = torch.cat([h, queries], dim=1)
        n = h.shape[1]
        qkv = block.attn.qkv(h).unflatten(-1, (3, block.attn.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask[:n, :n], -math.inf)
        h = h + block.norm1(block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        h = h + block.norm2(block.mlp(h))
    z = encoder.norm(h[:, -n_tokens:])
    return torch.zeros_like(z).scatter(1, order[..., None].expand_as(z), z)


def set_inputs(config: NovaConfig, n_rows: int = 2) -> dict[str, Tensor]:
    n_tokens, width = config.n_tokens, config.width
    return {
        "content": normal(n_rows, n_tokens, width, seed=2),
        "queries": normal(n_rows, n_tokens, width, seed=3),
        "condition": normal(n_rows, 2, width, seed=4),
    }


SET_SIZES = [1, 0, 3, 4]


@both_ops
def test_sets_by_their_rule(ops) -> None:
    """Values and all gradients against a dense mask."""
    encoder = model_of(TINY, ops).image_encoder
    order = orders(1, TINY.n_tokens)
    x = {name: v.requires_grad_() for name, v in set_inputs(TINY, n_rows=1).items()}
    leaves = [*x.values(), *encoder.blocks.parameters(), *encoder.norm.parameters()]
    weight = normal(1, TINY.n_tokens, TINY.width, seed=5)
    z = set_causal.predict_all(encoder, **x, order=order, set_sizes=SET_SIZES)
    expected = dense_reference(encoder, x, order, SET_SIZES)
    assert_same(z, expected)
    assert_same(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (z, expected)))


@pytest.mark.portable_only
@both_ops
def test_a_set_depends_on_those_before_it(ops) -> None:
    """Not on its own content, which is what it is asked for."""
    encoder = model_of(TINY, ops).image_encoder
    order, x = orders(2, TINY.n_tokens), set_inputs(TINY)
    content = x["content"].requires_grad_()
    z = set_causal.predict_all(encoder, **x, order=order, set_sizes=SET_SIZES)
    first = 0
    for n in SET_SIZES:
        own = take(z, order[:, first : first + n])
        (grad,) = torch.autograd.grad(own.square().sum(), content, retain_graph=True)
        read = take(grad, order).abs().amax(dim=-1) > 0
        assert torch.equal(read, ((torch.arange(8) < first) & (n > 0)).expand(2, -1))
        first += n


@both_ops
@every_config
def test_sets_one_after_another_are_all_at_once(name: str, ops) -> None:
    config = CONFIGS[name]
    encoder = model_of(config, ops).image_encoder
    order, x = orders(2, config.n_tokens), set_inputs(config)
    with torch.no_grad():
        z = set_causal.predict_all(encoder, **x, order=order, set_sizes=SET_SIZES)
        cache = set_causal.new_cache(encoder, 2, 2)
        new, new_ids, first = x["condition"], None, 0
        for n in filter(None, SET_SIZES):
            ids = order[:, first : first + n]
            queries = take(x["queries"], ids)
            out = set_causal.predict_set(encoder, cache, new, queries, new_ids=new_ids, ids=ids)
            assert_same(out, take(z, ids))
            new, new_ids, first = take(x["content"], ids), ids, first + n
    assert cache.length == 2 + config.n_tokens - SET_SIZES[-1]
    with pytest.raises(ValueError, match="set_sizes: expected 8 tokens in all, got 7"):
        set_causal.predict_all(encoder, **x, order=order, set_sizes=[3, 4])


@pytest.mark.portable_only
def test_a_pass_may_leave_tokens_out_of_the_cache() -> None:
    cache = KVCache(Encoder(2, 4, 1), 1, 5)
    k = normal(1, 1, 3, 4, dtype=torch.float32)
    keys, values = cache.extend(1, k, 2 * k)
    assert torch.equal(keys, k) and torch.equal(values, 2 * k)
    cache.advance(1)
    keys, _ = cache.extend(1, k[:, :, 1:], k[:, :, 1:])
    assert torch.equal(keys, k) and cache.data[0].abs().sum() == 0


# What the interpreter adds is seen in these.
INTERPRETED = {"diffusion_mlp", "temporal_kvcache"}


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        pytest.param(
            name,
            ops,
            marks=[] if ops == "fused" and name in INTERPRETED else pytest.mark.portable_only,
        )
        for name in CASES
        for ops in ("eager", "fused")
    ],
)
def test_golden(name: str, ops: str) -> None:
    outcome = check(CASES[name], ops, torch.float32, "cpu")
    assert outcome.status == "PASS", outcome
