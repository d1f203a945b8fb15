"""``encdec generate`` on a trained work directory: prompts, files, resuming, mistakes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import pytest

from encdec import cli
from encdec.errors import ConfigError
from encdec.inference.generate_command import main
from encdec.inference.generator import Generator
from tests.inference.conftest import LEARNED

SOURCES = [source for source, _ in LEARNED]
TARGETS = [target for _, target in LEARNED]


@pytest.fixture
def generate(encoder_decoder_run):
    """Calls the command on the trained model, with few rows so that shapes are shared."""
    return lambda *argv: main([f"--checkpoint={encoder_decoder_run}", "--batch_rows=2", *argv])


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def printed_texts(capsys):
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def inputs_file(folder, texts=None):
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"source": s}) + "\n" for s in texts or SOURCES))
    return path


def test_texts_on_the_command_line(generate, capsys):
    assert generate(SOURCES[0]) == 0
    assert capsys.readouterr().out == TARGETS[0] + "\n"
    generate(*SOURCES[:2])
    assert capsys.readouterr().out == f"--- 0\n{TARGETS[0]}\n--- 1\n{TARGETS[1]}\n"
    generate("--logprobs", "--max_tokens=2", SOURCES[1])
    row = json.loads(capsys.readouterr().out)
    assert row["text"] == TARGETS[1][:2] and row["finish"] == "length" and row["tokens"] == 2
    assert len(row["token_log_probs"]) == len(row["token_ids"]) == 2
    assert sum(row["token_log_probs"]) == pytest.approx(row["log_prob"], abs=1e-5)


def test_a_terminal_sees_the_text_grow(generate, monkeypatch):
    class Terminal(io.StringIO):
        def __init__(self):
            super().__init__()
            self.pieces = []

        def isatty(self):
            return True

        def write(self, text):
            self.pieces.append(text)
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    generate(SOURCES[1], "--stop=e")
    assert terminal.getvalue() == "blu\n"
    assert len([piece for piece in terminal.pieces if piece]) == 4  # three letters, a line's end


def test_files_in_and_out(generate, tmp_path, capsys, monkeypatch):
    path, out = inputs_file(tmp_path), tmp_path / "out.jsonl"
    generate(f"--file={path}", f"--out={out}")
    rows = rows_of(out)
    assert [row["text"] for row in rows] == TARGETS
    assert [row["source"] for row in rows] == SOURCES
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert "4 inputs answered" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is the file of inputs; give another --out"):
        generate(f"--file={path}", f"--out={tmp_path}/../{tmp_path.name}/{path.name}")
    plain = tmp_path / "in.txt"
    plain.write_text("\n".join(SOURCES[:2]))
    generate(f"--file={plain}")
    assert printed_texts(capsys) == TARGETS[:2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(plain.read_bytes())))
    generate("--file=-")
    assert printed_texts(capsys) == TARGETS[:2]


def test_a_stopped_job_goes_on_where_it_was(generate, tmp_path, capsys, monkeypatch):
    path, out = inputs_file(tmp_path, SOURCES * 10), tmp_path / "out.jsonl"
    flags = (f"--file={path}", f"--out={out}", "--temperature=1.5", "--samples=2", "--seed=3")
    generate(*flags)
    whole = out.read_bytes()
    assert len(whole.splitlines()) == 80
    generate(*flags)
    assert out.read_bytes() == whole and "already has all 40 answers" in capsys.readouterr().err
    # Killed within a line, with one sample of an input written and the other not.
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:35]) + lines[35][:20])
    asked = []
    plain = Generator.generate
    monkeypatch.setattr(
        Generator,
        "generate",
        lambda self, texts, *args, **kwargs: (
            asked.append(len(texts)),
            plain(self, texts, *args, **kwargs),
        )[1],
    )
    generate(*flags)
    assert [json.loads(a) | {"log_prob": 0} for a in out.read_bytes().splitlines()] == [
        json.loads(b) | {"log_prob": 0} for b in lines
    ]
    assert sum(asked) == 40 - 17
    assert "17 of 40 inputs are answered already" in capsys.readouterr().err


def _nothing_is_read(monkeypatch):
    read = "encdec.inference.load_generator.load_params_for_inference"
    monkeypatch.setattr(read, lambda *args: pytest.fail("parameters were read"))


def test_the_checkpoint_whose_step_is_recorded_is_the_one_that_is_read(generate, monkeypatch):
    """A run that is still training may save another in between."""
    read = []

    def load(checkpoint, step, **rest):
        read.append(step)
        raise ConfigError("enough")

    monkeypatch.setattr("encdec.inference.load_generator.load", load)
    with pytest.raises(ConfigError, match="enough"):
        generate("x")
    assert read == [120]


def test_another_job_does_not_mix_into_the_file(
    generate, tmp_path, encoder_decoder_run, capsys, monkeypatch
):
    path, out = inputs_file(tmp_path), tmp_path / "out.jsonl"
    generate(f"--file={path}", f"--out={out}", "--max_tokens=3")
    before = out.read_bytes()
    _nothing_is_read(monkeypatch)
    common = [f"--checkpoint={encoder_decoder_run}", f"--out={out}"]
    other = inputs_file(tmp_path / ".", [SOURCES[0], "another"])
    for argv, code, message in (
        ([f"--file={other}", "--max_tokens=4"], 2, "max_tokens is 3 there and 4 here"),
        ([f"--file={other}", "--max_tokens=3", "--keep_unknown"], 2, "keep_unknown is "),
        ([f"--file={other}", "--max_tokens=3"], 3, "answers input 1 with source 'two fish'"),
        ([f"--file={other}", "--out=/nowhere/x"], 2, "the directory /nowhere does not exist"),
        ([f"--file={other}", f"--out={tmp_path}"], 2, "is a directory; give a file's name"),
    ):
        assert cli.main(["generate", *common, *argv]) == code
        assert message in capsys.readouterr().err
    inputs_file(tmp_path, SOURCES[:2])
    assert cli.main(["generate", *common, f"--file={path}", "--max_tokens=3"]) == 3
    assert "answers 4 inputs, but there are only 2" in capsys.readouterr().err
    (tmp_path / "out.jsonl.settings.json").unlink()
    assert cli.main(["generate", *common, f"--file={path}", "--max_tokens=3"]) == 3
    assert "which records its settings" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_long_inputs_are_cut_when_asked_and_counted(generate, tmp_path, capsys):
    path, out = inputs_file(tmp_path, [SOURCES[0], "x" * 60]), tmp_path / "out.jsonl"
    generate(f"--file={path}", f"--out={out}", "--too_long=cut")
    assert [row.get("source_truncated", False) for row in rows_of(out)] == [False, True]
    assert "1 inputs were cut" in capsys.readouterr().err
    generate("x" * 60, "--too_long=cut", "--max_tokens=1")
    assert "1 of 1 inputs were cut" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, code, message",
    [
        ([], 2, "no input; give a text, or --file=IN"),
        (["x", "--file=y"], 2, "leave one of the two out"),
        (["x", "--out=y"], 2, "--out=y is for --file"),
        (["x", "--temperature=-1"], 2, "temperature is -1.0; expected 0 (greedy)"),
        (["x", "--top_p=0.5"], 2, "set temperature above 0"),
        (["x", "--beams=2", "--stop=y"], 2, "beam search"),
        (["x", "--beams=2", "--draft=lookup"], 2, "draft is lookup, which has no effect"),
        (["x", "--batch_rows=0"], 2, "batch_rows is 0; expected 1 or more"),
        (["x", "--max_input_tokens=1"], 2, "max_input_tokens is 1; expected 2 or more"),
        (["x", "--devices=9"], 2, "devices is 9, but this machine has 8"),
        (["x", "--tensor=2"], 2, "1 devices cannot hold copies of the model"),
        ([" "], 3, "the input is empty; give a text"),
        (["x" * 30], 3, "the input has 31 tokens, but the model accepts 24; shorten it"),
        (["fine", "x" * 30], 3, "input 1 has 31 tokens"),
        (["--file=nowhere.txt"], 3, "input file nowhere.txt not found"),
        (["x", "--step=7"], 4, "does not have checkpoint 7 (there are: 120)"),
        (["x", "--checkpoint=/nowhere"], 4, "/nowhere has no config.json"),
    ],
)
def test_mistakes_are_named_before_anything_is_compiled(
    argv, code, message, encoder_decoder_run, capsys, monkeypatch
):
    _nothing_is_read(monkeypatch)
    assert cli.main(["generate", f"--checkpoint={encoder_decoder_run}", *argv]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"source": "a"}\n\n', ":2: the line is empty"),
        (b'{"target": "a"}\n', ":1: no 'source' (keys: 'target')"),
        (b'{"source": "a"}\n{"source": " "}\n', ":2: the text is empty"),
        (b'{"source": "\xff"}\n', ":1: invalid UTF-8: byte 0xff"),
        (b'{"source": 3}\n', ":1: 'source' is int 3, expected a string"),
        (b"", ":1: the file is empty"),
    ],
)
def test_bad_files_name_the_line_and_write_nothing(
    content, message, tmp_path, encoder_decoder_run, capsys
):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(content)
    assert (
        cli.main(
            ["generate", f"--checkpoint={encoder_decoder_run}", f"--file={path}", f"--out={out}"]
        )
        == 3
    )
    error = capsys.readouterr().err
    assert message in error and "max_bad_rows" not in error  # a flag that is not there
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_another_vocabulary_in_the_work_directory_is_refused(encoder_decoder_run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(encoder_decoder_run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["vocabulary"]["fingerprint"] = "0" * 64
    (copy / "config.json").write_text(json.dumps(config))
    assert cli.main(["generate", f"--checkpoint={copy}", "x"]) == 3
    assert "fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["devices", "tensor"])
def test_an_export_is_not_spread_over_devices(flag, encoder_decoder_run, tmp_path, capsys):
    export = tmp_path / "export"
    shutil.copytree(encoder_decoder_run, export, ignore=shutil.ignore_patterns("checkpoints"))
    content = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(content | {"export": {"format": "onnx"}}))
    assert cli.main(["generate", f"--checkpoint={export}", f"--{flag}=2", "x"]) == 2
    assert f"{flag} is 2, but {export} is an export" in capsys.readouterr().err


def test_a_moved_work_directory_is_enough_in_a_fresh_process(decoder_only_run, tmp_path):
    """No records, no TensorFlow, nothing but the directory; programs are kept on disk."""
    moved = tmp_path / "moved"
    shutil.copytree(decoder_only_run, moved)
    code = (
        "import sys; from encdec import cli\n"
        "code = cli.main(sys.argv[1:]); assert 'tensorflow' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", f"--checkpoint={moved}", *SOURCES],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"--- {i}\n{text}\n" for i, text in enumerate(TARGETS))
