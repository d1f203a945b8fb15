"""What all commands have in common: how much they say, and how their flags are called."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import logging
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from encdec import cli, flags, logs
from encdec.data.prepare_progress import ProgressLine
from encdec.data.prepare_settings import PrepareSettings
from encdec.distill.logits_progress import LogitsProgress
from encdec.distill.teacher_logits_settings import TeacherLogitsSettings
from encdec.errors import ConfigError
from encdec.fields import listed
from encdec.inference import progress
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.progress import ProgressBar
from encdec.train.metrics import Console
from encdec.train.session import _introduce
from tests.parsers import all_parsers

PACKAGE = pathlib.Path(cli.__file__).parent


@pytest.fixture(autouse=True)
def usual_level():
    with logs.restored():
        logs.set_level(logs.USUAL)
        yield


def test_the_parsers_are_those_of_all_commands():
    named = set()
    for path in PACKAGE.rglob("*.py"):
        named |= set(re.findall(r'Parser\(\s*prog="(encdec [\w ]+)"', path.read_text()))
    assert len(named) > 30
    reached = all_parsers()
    for program in named:
        assert any(words == program or words.startswith(f"{program} ") for words in reached)


@pytest.mark.parametrize("words", all_parsers())
def test_every_command_is_quiet_or_verbose_if_told(words, capsys):
    parser = all_parsers()[words]
    required = [action for action in parser._actions if action.required]
    for action in required:
        action.required = False
    for group in parser._mutually_exclusive_groups:
        group.required = False
    values = ["x"] * sum(action.nargs != "*" for action in required if not action.option_strings)
    if words == "encdec completion":
        values = ["bash"]
    try:
        for flag, level in (("--quiet", logs.QUIET), ("--verbose", logs.VERBOSE)):
            given = parser.parse_args([*values, flag])
            assert logging.getLogger("encdec").level == level
            assert os.environ[logs.VARIABLE] == logging.getLevelName(level)
            assert not {"quiet", "verbose"} & set(vars(given))
        with pytest.raises(SystemExit):
            parser.parse_args([*values, "--quiet", "--verbose"])
        assert "not allowed with" in capsys.readouterr().err
    finally:
        for action in required:
            action.required = True


def test_nothing_but_errors_is_printed_past_the_levels():
    """All else on standard error goes through ``encdec.logs``, which obeys the two flags."""
    allowed = {"cli.py", "logs.py", "train/train_command.py", "train/metrics.py"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                streams = [ast.unparse(k.value) for k in node.keywords if k.arg == "file"]
                if streams and streams != ["sys.stdout"]:
                    found.add(path.relative_to(PACKAGE).as_posix())
    assert found <= allowed, found - allowed


def _verify(capsys, records, *flags):
    assert cli.main(["data", "verify", str(records), *flags]) == 0
    return capsys.readouterr()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("said")
    (folder / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n' * 20)
    files = [f"--jsonl={folder / 'pairs.jsonl'}", f"--out={folder / 'records'}"]
    given = ["--inputs_length=16", "--targets_length=16", "--vocabulary=bytes", "--workers=1"]
    assert cli.main(["prepare", *files, *given, "--quiet"]) == 0
    return folder / "records"


def test_verify_says_less_and_more(records, capsys):
    capsys.readouterr()
    usual, quiet, verbose = (
        _verify(capsys, records, *given) for given in ((), ("--quiet",), ("--verbose",))
    )
    outs = [re.sub(r"[\d.]+ s\b", "0 s", one.out) for one in (usual, quiet, verbose)]
    assert "verify: rows" in usual.err and usual.out
    assert quiet.err == "" and outs == [outs[0]] * 3
    assert re.search(r"^\d\d:\d\d:\d\d INFO encdec\.\S+: verify: rows$", verbose.err, re.M)
    assert "DEBUG encdec.cli: done in" in verbose.err
    # Each call ends with the level that it found.
    assert _verify(capsys, records).err == usual.err


def test_bars_and_lines_of_progress_are_left_out_and_warnings_are_not(records, capsys, monkeypatch):
    monkeypatch.setattr(progress, "REPORT_SECONDS", -1)
    monkeypatch.setattr("encdec.data.prepare_progress.LOG_SECONDS", -1)
    monkeypatch.setattr("encdec.distill.logits_progress.REPORT_SECONDS", -1)

    class Counts:
        examples = rows = tokens = bytes = 7
        lost = None

    class Later(Counts):
        rows, tokens = 8, 9

    def everything():
        ProgressBar("job", 10)(1, 5)
        ProgressLine()(Counts)
        stored = LogitsProgress(str(records))
        stored(Counts), stored(Later)
        console = Console(10)
        console.say("a line")
        console.write_scalars(3, {"train/loss": 1.0})
        console.warn("warning: few rows")
        return capsys.readouterr().err

    shown = everything()
    for part in ("job: 1 of 10", "prepare: 7 examples", "8 of", "a line", "step 3/10", "few rows"):
        assert part in shown
    logs.set_level(logs.QUIET)
    assert everything() == "warning: few rows\n"


@pytest.mark.parametrize("batch_size", [15, 16])
def test_a_batch_larger_than_the_data_is_warned_of_even_if_quiet(batch_size, capsys):
    program = SimpleNamespace(
        mesh=SimpleNamespace(shape={"data": 1}),
        abstract_state=SimpleNamespace(params={}),
        unsharded=[],
    )
    start = {"model": "test", "init_architecture": "source", "init_from": "runs/a"}
    run = SimpleNamespace(**start, steps=5, batch_size=batch_size)
    job = SimpleNamespace(program=program, run=run, teacher=None, records=range(15))
    logs.set_level(logs.QUIET)
    _introduce(job, Console(5))
    larger = "a batch of 16 rows is larger than the data, 15 rows"
    shown = capsys.readouterr().err
    assert (
        (larger in shown and "--config.batch_size=1 " in shown) if batch_size == 16 else not shown
    )


def test_verbose_shows_where_an_error_began(capsys):
    assert cli.main(["describe", "nothing", "--verbose"]) == ConfigError.exit_code
    err = capsys.readouterr().err
    assert "in find_model" in err and err.rstrip().splitlines()[-1].startswith(
        "encdec: error: unknown preset"
    )
    assert cli.main(["describe", "nothing", "--quiet"]) == ConfigError.exit_code
    assert re.fullmatch(r"encdec: error: .*\n", capsys.readouterr().err)


def test_processes_that_a_command_starts_have_its_level():
    program = (
        "from encdec import logs; "
        "print(logs.shows_progress(), logs.logger('encdec').isEnabledFor(logs.VERBOSE))"
    )
    for level, shown in ((logs.QUIET, "False False"), (logs.VERBOSE, "True True")):
        logs.set_level(level)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout.strip() == shown, done.stderr
    assert logs._level_named("nonsense") == logs.USUAL


def test_other_projects_are_heard_after_verbose_alone(capsys):
    other = logging.getLogger("jax.anything")
    logs.set_level(logs.VERBOSE)
    other.info("compiled")
    assert "INFO jax.anything: compiled" in capsys.readouterr().err
    logs.set_level(logs.USUAL)
    other.info("compiled")
    assert capsys.readouterr().err == ""


# What a flag means, by its one name: names that others may think of, and how a help would say it.
MEANINGS = {
    "--out": (
        "output outdir out_dir output_dir dest destination images write save_to",
        r"^(receives|(also )?write|director(y|ies) to write|the \S+ (file )?to write|results$"
        r"|for the (figures|pictures))",
    ),
    "--workdir": (
        "work work_dir working_dir rundir run_dir",
        r"^receives (everything|runs|checkpoints)",
    ),
    "--checkpoint": (
        "ckpt model_dir model_path weights writer",
        r"^(a trained model|work directory of)",
    ),
    "--json": ("as_json print_json to_json", r"^(print JSON|JSON lines)"),
    "--dry_run": ("dry print_jobs print_only no_run", r"^(only print|train nothing; print)"),
    "--overwrite": ("force replace clobber", r"^replace "),
    "--max_examples": (
        "limit examples num_examples max_rows head",
        r"first N|only N|no more than this many",
    ),
    "--inputs_length": ("inputs input_length source_length", r"^(source|input) tokens"),
    "--targets_length": ("targets target_length", r"^target tokens"),
    "--batch_size": ("batch bs rows_per_step", r"^rows (of a (batch|step)|a step)"),
    "--batch_rows": ("batch_texts", r"(generated|answered|made) (at once|together)"),
    "--repeats": ("rounds repetitions turns", r"timed runs|^turns|passes of each"),
    "--resamples": ("bootstrap bootstraps draws", r"bootstrap"),
    "--too_long": ("truncate cut on_long", r"cut their end"),
    "--step": ("checkpoint_step ckpt_step", r"checkpoint \(default"),
    "--seed": ("random_seed rng", r"^(seed of|of (drawing( \(|$)|the draws|what is drawn))"),
    "--format": ("from kind fmt input_format", r"^format of"),
    "--data_dir": ("data datadir data_folder", r"(directory with|where) the tasks?'s? "),
    "--vocabulary": ("vocab tokenizer spm", r"^a \.model"),
    "--module": ("import_module plugin modules", r"^Python module"),
    "--quiet": ("silent q", r"only errors, warnings and results"),
    "--verbose": ("debug v", r"also print details"),
}
# Words of the table with another meaning: shares of a teacher, rounds of distillation, and so on.
OTHER_MEANINGS = {
    "encdec distill rounds": {"--rounds", "--draws", "--teacher"},
    "encdec distill logits": {"--draws", "--teacher"},
    "encdec compile": {"--hlo"},
    "encdec paper": {"--results"},
    "encdec paper search": {"--results"},
    "encdec benchmark adaptation": {"--results"},
    "encdec generate": {"--logprobs"},
    "encdec serve": {"--slots"},
    "encdec benchmark edge": {"--export_only"},
}


def visible_flags():
    """(command, flag, action) of every flag that a help shows."""
    for words, parser in all_parsers().items():
        for action in parser._actions:
            for flag in action.option_strings:
                if flag.startswith("--") and action.help != argparse.SUPPRESS:
                    yield words, flag, action


def test_one_name_for_one_thing():
    """A new flag whose meaning has a name already takes that name; see ``MEANINGS``."""
    named = {f"--{word}": name for name, (words, _) in MEANINGS.items() for word in words.split()}
    wrong = []
    for words, flag, action in visible_flags():
        if flag in OTHER_MEANINGS.get(words, ()):
            continue
        if flag in named:
            wrong.append(f"{words} {flag}: the name is {named[flag]}")
        text = (action.help or "") % {"default": action.default, "prog": words}
        said = {name for name, (_, help_) in MEANINGS.items() if re.search(help_, text)}
        if said and flag not in said:
            wrong.append(f"{words} {flag} ({text[:60]}): the name is {' or '.join(sorted(said))}")
    assert not wrong, "\n".join(wrong)


def test_a_name_is_of_one_kind_everywhere_and_in_one_spelling():
    kinds: dict[str, dict[bool, list[str]]] = {}
    for words, flag, action in visible_flags():
        assert re.fullmatch(r"--[a-z0-9]+(_[a-z0-9]+)*", flag), f"{words} {flag}"
        kinds.setdefault(flag, {}).setdefault(action.nargs == 0, []).append(words)
    assert not {flag: found for flag, found in kinds.items() if len(found) > 1}
    assert set(kinds["--json"]) == {True} and set(kinds["--out"]) == {False}
    for path in (PACKAGE.parent / "launch").glob("*.py"):
        assert not re.findall(r'add_argument\(\s*"--\w+-', path.read_text()), path


FORMER = {
    (words, former): today
    for words, parser in all_parsers().items()
    for former, today in parser.former.items()
}


def test_former_names_mean_flags_that_are_there():
    assert len(FORMER) == sum(len(commands) for _, _, *commands in flags.FORMER)
    for (words, former), today in FORMER.items():
        flag, _, value = today.partition("=")
        shown = {name: action for program, name, action in visible_flags() if program == words}
        assert flag in shown and former not in shown, f"{words}: {former}"
        assert not value or value in shown[flag].choices


def test_former_names_are_accepted_and_said_to_have_changed(capsys):
    parser = all_parsers()["encdec compile"]
    given = ["--config=c.py", "--topology=v5e:2x2", "--inputs", "7", "--json=f.json"]
    options = parser.parse_args(given)
    assert (options.inputs_length, options.out) == (7, "f.json")
    assert "encdec compile: --json is now called --out" in capsys.readouterr().err
    generate = all_parsers()["encdec generate"].parse_args
    assert generate(["--checkpoint=a", "--truncate", "text"]).too_long == "cut"
    # After -- they are texts.
    assert generate(["--checkpoint=a", "--", "--truncate"]).text == ["--truncate"]
    # An action has its own, as encdec's own parsing of actions calls it.
    with pytest.raises(ConfigError, match="--max_examples is -1"):
        cli.load(cli.COMMANDS["scaling"][0])(
            ["evaluate", "--ladder=x", "--workdir=y", "--task=z", "--examples=-1"]
        )


# Numbers that a settings object checks, for Python too: its own tests hold their bounds.
BY_SETTINGS = {
    **dict.fromkeys(
        ("generate", "evaluate", "distill rollout", "distill rounds"),
        frozenset(field.name for field in dataclasses.fields(GenerationSettings)),
    ),
    "prepare": {field.name for field in dataclasses.fields(PrepareSettings)},
    "distill logits": {field.name for field in dataclasses.fields(TeacherLogitsSettings)},
    "vocab": {"size"},
}


@pytest.mark.parametrize("words", all_parsers())
def test_a_number_out_of_range_is_refused(words, capsys):
    """Before anything else is said of the command line."""
    parser = all_parsers()[words]
    checked = BY_SETTINGS.get(words.removeprefix("encdec "), ())
    for action in parser._actions:
        kind = getattr(action.type, "__name__", "")
        if kind not in ("int", "float") or action.dest in checked:
            continue
        flag = action.option_strings[-1]
        with pytest.raises(ConfigError, match=f"{flag} is -7; expected .*(more|less)|-7.*to"):
            parser.parse_args([f"{flag}=-7"])
        if kind == "float":
            with pytest.raises(ConfigError, match=f"{flag} is nan"):
                parser.parse_args([f"{flag}=nan"])
        with pytest.raises(SystemExit):
            parser.parse_args([f"{flag}=few"])
        assert f"argument {flag}: invalid {kind} value: 'few'" in capsys.readouterr().err


def test_numbers_that_settings_check_have_a_bound():
    for kind in (PrepareSettings, TeacherLogitsSettings):
        for field in dataclasses.fields(kind):
            flag = field.metadata["flag"]
            number = flag.get("type") in (int, float) and "nargs" not in flag
            # The two of logits that are no integers are SparseFormat's.
            if number and field.name not in ("temperature", "proposal"):
                assert field.metadata["least"] is not None, field.name


def test_bounds_of_numbers():
    parser = flags.Parser(prog="encdec x")
    parser.add("--share", "a share", float, 0.5, above=0, most=1)
    parser.add("--port", "a port", int, 80, least=0, most=65535)
    assert vars(parser.parse_args(["--share=1", "--port=0"])) == {"share": 1.0, "port": 0}
    for given, message in (
        ("--share=0", "--share is 0; expected more than 0, up to 1"),
        ("--share=1.5", "--share is 1.5; expected more than 0, up to 1"),
        ("--share=inf", "--share is inf"),
        ("--port=65536", "--port is 65536; expected 0 to 65535"),
    ):
        with pytest.raises(ConfigError, match=message):
            parser.parse_args([given])


@pytest.mark.parametrize(
    "words, given, message",
    [
        ("adapt s --out=o", "--encoder_step=3", "--encoder_step=3 .* without --encoder_source"),
        ("export --checkpoint=c --format=hf --out=o", "--check_pairs=9", "without --check"),
        ("export --checkpoint=c --format=hf --out=o", "--private", "--private .* without --push"),
        ("export --checkpoint=c --format=onnx --out=o", "--own", "and --format is onnx; give both"),
        ("generate --checkpoint=c text", "--format=jsonl", "without --file"),
        ("import x --out=o", "--head_dim=64", "without --format=mu, and --format is hf"),
        ("distill logits", "--process_id=1", "without --distributed"),
        ("train --config=c --workdir=w", "--num_processes=2", "without --distributed"),
        ("scaling plan --ladder=l", "--mfu=0.3", "without --chip"),
        ("benchmark speculate", "--always", "--always .* without --checkpoint"),
        ("compile --config=c --topology=t", "--layers=3", "without --what=layer"),
        ("compile --config=c --topology=t --what=layer", "--search", "--search.*--what=train"),
        ("compile --config=c --topology=t --what=layer", "--targets_length=9", "--what is layer"),
        ("compile --config=c --topology=t --what=calibrate", "--rows=2", "--what is calibrate"),
    ],
)
def test_a_flag_that_has_no_effect_is_refused(words, given, message):
    name = max((n for n in all_parsers() if f"encdec {words} ".startswith(f"{n} ")), key=len)
    rest = f"encdec {words}".removeprefix(name).split()
    all_parsers()[name].parse_args(rest)
    with pytest.raises(ConfigError, match=f"{message}.*leave"):
        all_parsers()[name].parse_args([*rest, given])


def test_a_flag_with_its_other_is_obeyed():
    parser = all_parsers()["encdec export"]
    given = ["--checkpoint=c", "--format=hf", "--out=o", "--own", "--check=r", "--check_pairs=9"]
    assert parser.parse_args(given).check_pairs == 9
    # After -- it is a text.
    generate = all_parsers()["encdec generate"].parse_args
    assert generate(["--checkpoint=a", "--", "--format=text"]).text == ["--format=text"]


def test_an_empty_value_is_refused():
    evaluate = all_parsers()["encdec evaluate"].parse_args
    for given in (["--tasks="], ["--tasks", ""], ["--split="]):
        with pytest.raises(ConfigError, match=f"{given[0].strip('=')} is empty; give a value"):
            evaluate(["--checkpoint=c", "--out=o", *given])
    assert all_parsers()["encdec prepare"].parse_args(["--beam_options="]).beam_options == ""
    empty = all_parsers()["encdec benchmark inference"].parse_args(["--uncached_inputs="])
    assert empty.uncached_inputs == ()
    assert listed("", "x") == () and listed("a, b", "x") == ("a", "b")
    for given in (",", " ", "a,,b"):
        with pytest.raises(ConfigError, match=f"--tasks is '{given}', which has an empty part"):
            listed(given, "--tasks")
