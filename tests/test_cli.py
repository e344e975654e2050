"""What a newcomer meets first: help, files that are wrong, machines that lack something."""

import argparse
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen import cli
from vidgen.checkpoint import read_config, read_safetensors, read_state_dict
from vidgen.media import check_output, read_frames
from vidgen.progress import Bars
from vidgen.text_encoders import read_tokenizer

pytestmark = pytest.mark.portable_only

ROOT = Path(__file__).parents[1]
MODELS = ("nova", "pyramid-flow", "repvideo")


def parsers(command: str) -> Iterator[argparse.ArgumentParser]:
    """Of a command and of those below it."""
    parser = argparse.ArgumentParser(prog=f"vidgen {command}")
    cli.COMMANDS[command][1](parser)
    found = [parser]
    while found:
        yield (parser := found.pop())
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if cli.COMMANDS[name][1]])
def test_every_option_says_what_it_is(command: str) -> None:
    for parser in parsers(command):
        assert len(parser.format_help()) > 100  # also that no % is left unescaped
        for action in parser._actions:
            is_choice_of_commands = isinstance(action, argparse._SubParsersAction)
            assert action.help or is_choice_of_commands, f"{parser.prog}: {action.dest}"


def test_dtypes_have_short_names() -> None:
    args = cli._parse(["verify", "--dtype", "bf16"])
    assert args.dtype == "bfloat16"


def test_help_of_commands_needs_no_extra() -> None:
    """Models, tests and the benchmarks aside: nothing but torch and triton is there."""
    absent = {name.partition(".")[0] for names in cli.EXTRAS.values() for name in names}
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)!r}))\n"
        "from vidgen import cli\n"
        "for command in cli.COMMANDS:\n"
        "    if cli.COMMANDS[command][1]:\n"
        "        try: cli.main([command, '--help'])\n"
        "        except SystemExit as done: assert done.code == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: vidgen") == sum(bool(x[1]) for x in cli.COMMANDS.values())


def error_of(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What a command that fails says: one line, with nothing above it."""
    assert cli.main([str(word) for word in words]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("vidgen") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--device", "gpu"], "device: expected cpu on this machine, got gpu"),
        (["--device", "cuda:1"], "device: expected cpu on this machine, got cuda:1"),
        (["--height", "0"], "height: expected at least 1, got 0"),
        (["--width", "-32"], "width: expected at least 1, got -32"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--embeddings", "FOLDER"], "embeddings: expected a file"),
        (["--embeddings", "TEXT"], "file: expected safetensors in"),
    ],
)
def test_options_that_generate_refuses(
    model: str, option: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "text").write_text("not tensors")
    paths = {"FOLDER": tmp_path, "TEXT": tmp_path / "text"}
    words = [paths.get(word, word) for word in option]
    output = tmp_path / "a.mp4"
    random = ("generate", model, "--random-weights", "--output", output)
    assert message in error_of(capsys, *random, *words)
    assert not output.exists()


@pytest.mark.parametrize("model", MODELS)
def test_checkpoints_that_are_none(model: str, tmp_path: Path, capsys) -> None:
    generate = ("generate", model, "--prompt", "a boat", "--output", tmp_path / "a.mp4")
    (tmp_path / "file").write_text("{}")
    for checkpoint in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
        assert ": expected " in error_of(capsys, *generate, "--checkpoint", checkpoint)


def test_generate_names_the_extra_before_it_works(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    words = ("generate", "nova", "--random-weights", "--output", tmp_path / "a.mp4")
    message = "vidgen: error: needs av: pip install 'vidgen-kernels[models]'\n"
    assert error_of(capsys, *words) == message


def test_the_name_of_a_module_inside_another(monkeypatch, capsys) -> None:
    """Python says that google is missing, which no extra is called."""

    def run(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError(name="google")

    monkeypatch.setitem(cli.COMMANDS, "info", ("", None, run))
    assert "needs google.protobuf: pip install" in error_of(capsys, "info")
    assert cli._absent(["torch", "no_such.module"]) == ["no_such.module"]


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys) -> None:
    def run(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", ("", None, run))
    assert error_of(capsys, "info") == "vidgen: error: interrupted\n"


def test_modules_that_are_not_ours_are_not_explained_away(monkeypatch) -> None:
    def run(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError(name="no_such_module")

    monkeypatch.setitem(cli.COMMANDS, "info", ("", None, run))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["info"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "is_shown"), [(Terminal, True), (io.StringIO, False)])
def test_bars_are_for_terminals(stream: type[io.StringIO], is_shown: bool, monkeypatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    with Bars() as progress:
        assert [*progress.track(range(3), "steps")] == [0, 1, 2]
    shown = written.getvalue()
    assert ("steps" in shown and "3/3" in shown) if is_shown else not shown


# ---- files


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.safetensors.index.json"])
def test_weights_that_are_none(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(ValueError, match=r"expected .* in .*"):
        read_state_dict(path)
    for content in (b"", b"not tensors", b"PK\x03\x04 half an archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected .*a"):
            read_state_dict(path)
    with pytest.raises(ValueError, match="file: expected safetensors in"):
        read_safetensors(tmp_path)


def test_nothing_in_a_torch_file_is_executed(tmp_path: Path) -> None:
    torch.save({"w": Path("a")}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"checkpoint: expected tensors in .*a\.bin"):
        read_state_dict(tmp_path / "a.bin")


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"config.json: expected JSON in {tmp_path}"):
        read_config(tmp_path)


def test_pictures_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=f"input: expected a video or image in {path}"):
        read_frames(path)


@pytest.mark.parametrize(("name", "module"), [("a.mp4", "av"), ("a.png", "PIL")])
def test_what_writes_the_output_is_asked_for_first(name, module, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=module):
        check_output(tmp_path / name, 1)


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_t5s_vocabulary_names_what_reads_it(missing: str, tmp_path: Path, monkeypatch) -> None:
    """The released T5 folders hold it alone, and transformers asks for tiktoken instead."""
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "google", sys)  # whether it is installed or not
    monkeypatch.setitem(sys.modules, "google.protobuf", sys)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError) as problem:
        read_tokenizer(None, tmp_path)
    assert problem.value.name == missing


def test_t5s_vocabulary_is_read(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")
    import sentencepiece
    import transformers

    kinds: Any = transformers  # which declares its tokenizers at run time
    words = ["a boat", "the harbour", "a fish", "the morning light"]
    trainer: Any = sentencepiece.SentencePieceTrainer
    trainer.train(
        sentence_iterator=iter(words * 30),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    read = read_tokenizer(kinds.T5TokenizerFast, tmp_path)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert read("a fish").input_ids == [*expected.encode("a fish"), 1]
