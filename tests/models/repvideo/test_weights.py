"""CogVideoX's and RepVideo's checkpoints: names, both layouts, conversion, what is refused."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.paths import GOLDEN
from vidgen import cli
from vidgen.common.checkpoint import write_state_dict
from vidgen.ops import FUSED
from vidgen.repvideo.model.config import CogVideoXConfig
from vidgen.repvideo.model.keys import to_diffusers, to_sat
from vidgen.repvideo.model.positions import sincos_table
from vidgen.repvideo.model.transformer import CogVideoXTransformer
from vidgen.repvideo.model.weights import config_of, load_pretrained, load_transformer

pytestmark = pytest.mark.portable_only

TINY = CogVideoXConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=12,
    num_layers=3,
    sample_width=8,
    sample_height=6,
    sample_frames=9,
    max_text_seq_length=5,
    gates=True,
)
PLAIN = replace(TINY, gates=False)
SIZES = {name: getattr(TINY, name) for name in ("sample_width", "sample_height", "sample_frames")}
SIZES["max_text_seq_length"] = 5
KEY_MAP = json.loads((GOLDEN / "repvideo" / "key_map.json").read_text())


def random_model(config: CogVideoXConfig = TINY) -> CogVideoXTransformer:
    model = CogVideoXTransformer(config)
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(std=0.3)
    return model


def output(model: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 3, 4, 6, 8, generator=generator)
    text = torch.randn(1, 5, 12, generator=generator)
    with torch.no_grad():
        y = model(latents, text, torch.tensor([500]))
    return y if isinstance(y, Tensor) else y.sample


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


def write_sat(
    folder: Path, state: dict[str, Tensor], prefix: str = "model.diffusion_model."
) -> None:
    """A training checkpoint as SAT writes it, with the other models in it."""
    (folder / "1000").mkdir(parents=True)
    (folder / "latest").write_text("1000\n")
    module = {f"model.diffusion_model.{name}": x for name, x in state.items()}
    module |= {"first_stage_model.encoder.conv_in.conv.weight": torch.ones(3)}
    module |= {"conditioner.embedders.0.transformer.shared.weight": torch.ones(2)}
    torch.save({"module": module}, folder / "1000" / "mp_rank_00_model_states.pt")


def position_table(config: CogVideoXConfig = TINY) -> Tensor:
    table = sincos_table(config, (3, 3, 4), torch.device("cpu"))
    return torch.cat([torch.zeros(5, config.width), table])[None]


# ---- names


def test_names_are_those_of_the_released_files() -> None:
    """Every line of the recorded map, with the shapes of both sides."""
    sizes = {"D": 32, "3D": 96, "4D": 128, "12D": 384, "2D": 64, "E": 8, "C": 4, "p": 2, "L": 3}
    sizes |= {"head_dim": 16, "text_dim": 12, "p*p*C": 16}
    state = to_sat(random_model().state_dict())
    for line in KEY_MAP["map"]:
        for p, form in zip(("weight", "bias"), line["shape"].split(" / ") * 2, strict=False):
            name = line["sat"].format_map({"i": 1, "weight,bias": p})
            if "drop" in line["transform"] or "computed" in line["transform"]:
                assert name not in state
                continue
            expected = [sizes[x.strip()] for x in form.strip("[]").split(",")]
            assert list(state[name].shape) == expected, name
            ours = [x.format_map({"i": 1, "weight,bias": p}) for x in line["diffusers"]]
            assert to_diffusers({name: state[name]}).keys() == set(ours or ["learnable_gating"])


def test_rows_are_in_the_order_of_the_released_files() -> None:
    rows = torch.arange(12.0)
    halves = to_diffusers({"mixins.adaln_layer.adaLN_modulations.7.1.bias": rows})
    assert halves["transformer_blocks.7.norm1.linear.bias"].tolist() == [0, 1, 2, 6, 7, 8]
    assert halves["transformer_blocks.7.norm2.linear.bias"].tolist() == [3, 4, 5, 9, 10, 11]
    thirds = to_diffusers({"transformer.layers.11.attention.query_key_value.bias": rows})
    names = [f"transformer_blocks.11.attn1.to_{x}.bias" for x in "qkv"]
    assert [thirds[name].tolist()[0] for name in names] == [0, 4, 8]


@pytest.mark.parametrize("config", [TINY, PLAIN, replace(TINY, patch_size_t=2, ofs_embed_dim=8)])
def test_names_there_and_back(config: CogVideoXConfig) -> None:
    state = random_model(config).state_dict()
    sat = to_sat(state)
    assert_same(to_diffusers(sat), state)
    assert_same(to_sat(to_diffusers(sat)), sat)
    assert not sat.keys() & (state.keys() - {"learnable_gating"})


def test_half_of_a_tensor_is_not_enough() -> None:
    state = random_model().state_dict()
    del state["transformer_blocks.1.attn1.to_k.bias"]
    with pytest.raises(ValueError, match=r"got no transformer_blocks\.1\.attn1\.to_k\.bias"):
        to_sat(state)


# ---- files


@pytest.mark.parametrize("has_table", [True, False])
def test_a_sat_folder(tmp_path: Path, has_table: bool) -> None:
    model = random_model()
    state = to_sat(model.state_dict())
    if has_table:
        state["mixins.pos_embed.pos_embedding"] = position_table()
    write_sat(tmp_path, state)
    loaded = load_pretrained(tmp_path, FUSED, **SIZES)
    assert loaded.config == TINY
    assert_same(loaded.state_dict(), model.state_dict())
    torch.testing.assert_close(output(loaded), output(model))


def test_a_sat_folder_with_rotary_positions(tmp_path: Path) -> None:
    """Its buffers of cosines and a table that is never read are no weights."""
    config = replace(PLAIN, use_rotary_positional_embeddings=True)
    state = to_sat(random_model(config).state_dict())
    for name in ("freqs_cos", "freqs_sin"):
        state[f"mixins.pos_embed.{name}"] = torch.ones(36, 16)
    state["transformer.position_embeddings.weight"] = torch.ones(64, 32)
    write_sat(tmp_path, state)
    assert load_pretrained(tmp_path, **SIZES).config == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_table_may_be_in_half_precision(dtype: torch.dtype) -> None:
    state = {name: x.to(dtype) for name, x in to_sat(random_model().state_dict()).items()}
    state["mixins.pos_embed.pos_embedding"] = position_table().to(dtype)
    assert load_transformer(TINY, state).proj_out.weight.dtype == dtype


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda table: table[:, :-1], r"expected shape \[1, 41, 32\] of the sizes in the config"),
        (lambda table: table.roll(1, dims=1), "expected the sines and cosines of its positions"),
    ],
)
def test_another_table_is_refused(edit, message: str) -> None:
    state = to_sat(random_model().state_dict())
    state["mixins.pos_embed.pos_embedding"] = edit(position_table())
    with pytest.raises(ValueError, match=message):
        load_transformer(TINY, state)


def test_a_config_from_the_weights() -> None:
    later = replace(
        TINY,
        in_channels=8,
        patch_size_t=2,
        patch_bias=False,
        ofs_embed_dim=8,
        use_rotary_positional_embeddings=True,
    )
    for config in (TINY, PLAIN, later):
        with torch.device("meta"):
            state = to_sat(CogVideoXTransformer(config).state_dict())
        assert config_of(state, **SIZES) == config
    with pytest.raises(ValueError, match=r"expected mixins\.patch_embed.*, found none"):
        config_of({"proj_out.weight": torch.zeros(1)})


def test_plain_weights_get_gates_of_zero_and_a_warning() -> None:
    plain = random_model(PLAIN)
    for state in (plain.state_dict(), to_sat(plain.state_dict())):
        with pytest.warns(UserWarning, match="no learnable_gating: plain CogVideoX"):
            model = load_transformer(TINY, state)
        assert model.learnable_gating is not None and not model.learnable_gating.any()
        assert model.learnable_gating.requires_grad
        assert torch.equal(output(model), output(plain))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "a.b."])
def test_wrapped_weights_keep_their_gates(tmp_path: Path, prefix: str) -> None:
    """Loading them warns of nothing."""
    model = random_model()
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    state = {prefix + key: x for key, x in model.state_dict().items()}
    write_state_dict(folder / "diffusion_pytorch_model.safetensors", state)
    found = load_pretrained(folder)
    for key, x in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], x), key


def test_checkpoints_that_do_not_fit() -> None:
    state = random_model().state_dict()
    with pytest.raises(ValueError, match="1 left over: learnable_gating"):
        load_transformer(PLAIN, state)
    with pytest.raises(ValueError, match="1 left over: extra"):
        load_transformer(TINY, {**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="24 missing: transformer_blocks"):
        load_transformer(replace(TINY, num_layers=4), state)
    with pytest.raises(ValueError, match=r"learnable_gating of shape \[3\], got \[1\]"):
        load_transformer(TINY, {**state, "learnable_gating": torch.zeros(1)})
    sat = to_sat(state)
    del sat["mixins.final_layer.linear.bias"]
    with pytest.raises(ValueError, match=r"1 missing: proj_out\.bias"):
        load_transformer(TINY, sat)


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected config\.json in"):
        load_pretrained(tmp_path)
    (tmp_path / "latest").write_text("12")
    with pytest.raises(ValueError, match=r"expected .*12/mp_rank_00_model_states\.pt"):
        load_pretrained(tmp_path)


# ---- vidgen convert


def convert(*arguments: str | Path) -> int:
    return cli.main(["convert", *map(str, arguments)])


@pytest.fixture
def sat_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "sat"
    write_sat(folder, to_sat(random_model().state_dict()))
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES))
    return folder


def test_there_and_back_is_bit_exact(sat_folder: Path, tmp_path: Path) -> None:
    """SAT to diffusers to SAT to diffusers."""
    options = ("--config", tmp_path / "sizes.json")
    assert convert(sat_folder, tmp_path / "first", *options) == 0
    assert convert(tmp_path / "first", tmp_path / "second") == 0
    assert convert(tmp_path / "second", tmp_path / "third", *options) == 0
    files = [
        torch.load(folder / (folder / "latest").read_text().strip() / "mp_rank_00_model_states.pt")
        for folder in (sat_folder, tmp_path / "second")
    ]
    own = [
        {k: x for k, x in file["module"].items() if k.startswith("model.diffusion_model.")}
        for file in files
    ]
    assert_same(own[1], own[0])
    first, third = tmp_path / "first", tmp_path / "third"
    assert {path.name for path in first.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    for path in first.iterdir():
        assert path.read_bytes() == (third / path.name).read_bytes()
    assert load_pretrained(first).config == TINY


def test_diffusers_reads_the_result(tmp_path: Path) -> None:
    """With gates of 0 it is the same model, but for the eps of one norm."""
    from diffusers.models.transformers.cogvideox_transformer_3d import (
        CogVideoXTransformer3DModel,
    )

    model = random_model()
    with torch.no_grad():
        model.get_parameter("learnable_gating").zero_()
    write_sat(tmp_path / "sat", to_sat(model.state_dict()))
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES))
    assert convert(tmp_path / "sat", tmp_path / "out", "--config", tmp_path / "sizes.json") == 0
    theirs = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out")
    theirs.norm_out.norm.eps = TINY.out_norm_eps
    torch.testing.assert_close(output(theirs), output(model))
    torch.testing.assert_close(output(load_pretrained(tmp_path / "out", FUSED)), output(model))


def test_what_diffusers_writes_is_read(tmp_path: Path) -> None:
    from diffusers.models.transformers.cogvideox_transformer_3d import (
        CogVideoXTransformer3DModel,
    )

    own = ("gates", "fixed_gate", "window", "out_norm_eps", "_class_name")
    options = {name: x for name, x in PLAIN.to_dict().items() if name not in own}
    theirs = CogVideoXTransformer3DModel(**options)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_pretrained(tmp_path / "pipeline")
    assert model.config == replace(PLAIN, out_norm_eps=1e-5)
    torch.testing.assert_close(output(model), output(theirs))
    assert convert(tmp_path / "pipeline", tmp_path / "sat") == 0
    assert_same(load_pretrained(tmp_path / "sat", **SIZES).state_dict(), theirs.state_dict())


def test_conversions_that_are_refused(sat_folder: Path, tmp_path: Path, capsys) -> None:
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        ((sat_folder, tmp_path), f"output: expected a new folder, {tmp_path} exists"),
        (
            (sat_folder, tmp_path / "no" / "out"),
            "output: expected an existing folder, got",
        ),
        ((tmp_path / "nowhere", tmp_path / "out"), "folder: expected config.json in"),
        ((sat_folder, tmp_path / "out", "--config", tmp_path / "no.json"), "expected no.json in"),
    ):
        assert convert(*arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("vidgen convert: ") and message in error
    file = sat_folder / "1000" / "mp_rank_00_model_states.pt"
    module = torch.load(file)["module"]
    del module["model.diffusion_model.time_embed.0.bias"]
    torch.save({"module": module}, file)
    assert convert(sat_folder, tmp_path / "out") == 1
    assert "1 missing: time_embedding.linear_1.bias" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind


def test_files_that_are_no_weights(sat_folder: Path, tmp_path: Path, capsys) -> None:
    """Nothing in them is executed, and the command says what is wrong."""
    file = sat_folder / "1000" / "mp_rank_00_model_states.pt"
    torch.save({"module": {"model.diffusion_model.x": Path("a")}}, file)
    assert convert(sat_folder, tmp_path / "out") == 1
    assert "it holds pathlib.PosixPath, which could run code" in capsys.readouterr().err
    for name in ("pt", "safetensors"):
        file.write_bytes(b"not tensors")
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"not tensors")
        assert convert(sat_folder if name == "pt" else tmp_path, tmp_path / "out") == 1
        assert capsys.readouterr().err.startswith("vidgen convert: ")
    assert not (tmp_path / "out").exists()


def test_other_files_of_weights(tmp_path: Path) -> None:
    """RepVideo in a folder whose config.json does not name the gates."""
    model = random_model()
    config = {k: x for k, x in TINY.to_dict().items() if k not in ("gates", "out_norm_eps")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_state_dict(tmp_path / "diffusion_pytorch_model.safetensors", model.state_dict())
    loaded = load_pretrained(tmp_path)
    assert loaded.config == replace(TINY, out_norm_eps=1e-5)
    assert_same(loaded.state_dict(), model.state_dict())
