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

from tests.paths import ROOT
from vidgen import cli
from vidgen.commands import info
from vidgen.common.arguments import output_folder
from vidgen.common.checkpoint import (
    read_config,
    read_safetensors,
    read_state_dict,
    write_state_dict,
)
from vidgen.common.installation import EXTRAS, absent
from vidgen.common.media import check_output, read_frames
from vidgen.common.progress import Bars
from vidgen.common.text_encoders import read_tokenizer

pytestmark = pytest.mark.portable_only

MODELS = ("nova", "pyramid-flow", "repvideo")


def parsers(command: str) -> Iterator[argparse.ArgumentParser]:
    """Of a command and of those below it."""
    parser = argparse.ArgumentParser(prog=f"vidgen {command}")
    cli.COMMANDS[command].add_arguments(parser)
    found = [parser]
    while found:
        yield (parser := found.pop())
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()


@pytest.mark.parametrize("command", [x for x in cli.COMMANDS if x not in ("info", "profile")])
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
    absent = {name.partition(".")[0] for names in EXTRAS.values() for name in names}
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)!r}))\n"
        "from vidgen import cli\n"
        "for command in cli.COMMANDS:\n"
        "    if command not in cli.PASSES_ARGUMENTS_ON:\n"
        "        try: cli.main([command, '--help'])\n"
        "        except SystemExit as done: assert done.code == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_commands = len(cli.COMMANDS) - len(cli.PASSES_ARGUMENTS_ON)
    assert done.stdout.count("usage: vidgen") == n_commands


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


def number_options() -> Iterator[tuple[list[str], argparse.Action]]:
    """The words up to an option and the option, of all whose values are checked numbers."""
    for command in ("generate", "train", "analyze"):
        for parser in parsers(command):
            for action in parser._actions:
                if action.type is not None and action.type is not Path:
                    yield parser.prog.split()[1:], action


def parse_error(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """What is said of arguments alone: one line, before anything is done."""
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("bad", ["x", "nan", "inf", "-1", "1e30", "9" * 30])
def test_numbers_out_of_range_are_refused_at_once(bad: str, capsys) -> None:
    options = list(number_options())
    assert len(options) > 60
    for words, action in options:
        values = [f"{action.option_strings[0]}={bad}"]
        if action.nargs == 3:
            values = [action.option_strings[0], "1", "1", bad]
        error = parse_error(capsys, [*words, *values])
        assert f"error: argument {action.option_strings[0]}: expected " in error
        assert f", got {bad};" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate nova --sets 0", "--sets: expected a whole number from 1 to 1000000, got 0"),
        ("generate nova --flow-shift 0", "--flow-shift: expected a number above 0, at most 1e+06"),
        ("generate nova --guidance-renorm 1.5", "expected a number above 0, at most 1, got 1.5"),
        ("generate nova --class-label 1001", "expected a whole number from 0 to 1000, got 1001"),
        ("generate repvideo --steps 1001", "expected a whole number from 1 to 1000, got 1001"),
        ("generate repvideo --height 1.5", "expected a whole number from 1 to 16384, got 1.5"),
        ("generate pyramid-flow --tiling 100", "a multiple of 32 from 32 to 16384, got 100"),
        ("train nova --learning-rate 2", "--learning-rate: expected a number from 0 to 1, got 2"),
        ("generate repvideo --guidance 4 --random-weights --output a", "arguments: --guidance 4;"),
        ("verify extra", "vidgen: error: unrecognized arguments: extra; see vidgen --help"),
    ],
)
def test_what_arguments_are_told(words: str, message: str, capsys) -> None:
    required = ["--random-weights", "--output", "a", "--data", "b"] if "--l" in words else []
    assert message in parse_error(capsys, [*words.split(), *required])


def test_too_little_memory_is_said_in_a_line(monkeypatch, capsys) -> None:
    def run(args: argparse.Namespace) -> int:
        torch.empty(2**60)
        return 0

    monkeypatch.setattr(info, "run", run)
    assert "vidgen: error: not enough memory: " in error_of(capsys, "info")

    def fail(args: argparse.Namespace) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        cli.main(["info"])


@pytest.mark.parametrize("name", ["/proc/a.mp4", "LINK", "LONG"])
def test_outputs_that_cannot_be_written(name: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """Which shows before the work, not after it."""
    (link := tmp_path / "link.mp4").symlink_to("nowhere.mp4")
    path = {"LINK": link, "LONG": tmp_path / f"{'a' * 250}.mp4"}.get(name, Path(name))
    monkeypatch.setattr("vidgen.nova.generate.generate", None)  # is not reached
    words = ("generate", "nova", "--random-weights", "--output", path)
    assert "output: expected a n" in error_of(capsys, *words)
    assert [x.name for x in tmp_path.iterdir()] == ["link.mp4"]


def test_folders_of_results_are_asked_for_first(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/a/b")):
        error = parse_error(capsys, ["bench", "attention", "--output", str(path)])
        assert f"--output: expected a folder that can be written, got {path}" in error
    assert output_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("option", ["--shapes", "--providers", "--dtype"])
def test_an_empty_filter_is_not_all(option: str, capsys) -> None:
    for bad in ("", "a,", " ,b"):
        error = parse_error(capsys, ["bench", "attention", f"{option}={bad}"])
        assert f"{option}: expected names with commas between, got {bad!r}" in error


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

    monkeypatch.setattr(info, "run", run)
    assert "needs google.protobuf: pip install" in error_of(capsys, "info")
    assert absent(["torch", "no_such.module"]) == ["no_such.module"]


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys) -> None:
    def run(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", run)
    assert error_of(capsys, "info") == "vidgen: error: interrupted\n"


def test_modules_that_are_not_ours_are_not_explained_away(monkeypatch) -> None:
    def run(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError(name="no_such_module")

    monkeypatch.setattr(info, "run", run)
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


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "UP"])
def test_indices_that_are_none(index: str, tmp_path: Path) -> None:
    """Nor does one name files elsewhere."""
    write_state_dict(tmp_path / "a.safetensors", {"w": torch.ones(1)})
    path = tmp_path / "below" / "a.safetensors.index.json"
    path.parent.mkdir()
    path.write_text(index.replace("UP", '{"weight_map": {"w": "../a.safetensors"}}'))
    with pytest.raises(ValueError, match=r"a\.safetensors\.index\.json: expected a"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [[1], 3, {"model": [1]}], ids=str)
def test_torch_files_without_names(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="checkpoint: expected tensors by name in"):
        read_state_dict(tmp_path / "a.bin", within="model")


def test_nothing_in_a_torch_file_is_executed(tmp_path: Path) -> None:
    torch.save({"w": Path("a")}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"checkpoint: expected tensors in .*a\.bin"):
        read_state_dict(tmp_path / "a.bin")


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"config.json: expected JSON in {tmp_path}"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=f"config.json: expected an object in {tmp_path}/config"):
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
