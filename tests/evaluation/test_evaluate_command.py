"""``encdec evaluate`` on models that learned four answers: scores, resuming, sharing, mistakes."""

from __future__ import annotations

import json
import shutil
from unittest import mock

import jax
import numpy as np
import pytest

from encdec import shipped
from encdec.data.vocabulary import load_vocabulary
from encdec.errors import ConfigError, DataError
from encdec.evaluation.evaluate import evaluate as evaluate_examples
from encdec.evaluation.evaluate_command import main
from encdec.evaluation.evaluation_report import read_report
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.evaluation.examples import Example, Examples
from encdec.evaluation.load_models import chosen_step
from encdec.evaluation.predictions import PredictionFiles, open_windows
from encdec.inference.generator import Generation
from encdec.interop.framing import Framing
from encdec.interop.importing import write_model
from encdec.metrics.metric_registry import METRICS
from encdec.saved.saved_params import load_params_for_inference
from tests.inference.conftest import LEARNED, decoder_only_run, encoder_decoder_run  # noqa: F401

# The last one is answered wrongly, and one right answer is the second reference.
WANTED = [["red."], ["green", "blue"], ["x"], ["quick"]]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "xsum").mkdir()
    with open(folder / "xsum" / "validation.jsonl", "w") as file:
        for (source, _), texts in zip(LEARNED, WANTED):
            file.write(json.dumps({"source": source, "target": texts[0], "targets": texts}) + "\n")
    return folder


@pytest.fixture
def evaluate(encoder_decoder_run, data_dir, tmp_path):
    def call(*more, out="out", checkpoint=encoder_decoder_run):
        assert (
            main(
                [
                    f"--checkpoint={checkpoint}",
                    "--tasks=xsum",
                    f"--data_dir={data_dir}",
                    f"--out={tmp_path / out}",
                    "--batch_rows=2",
                    "--resamples=50",
                    *more,
                ]
            )
            == 0
        )
        return tmp_path / out

    return call


def rows_of(out):
    lines = [
        line
        for path in sorted((out / "xsum").glob("predictions-*.jsonl"))
        for line in path.read_bytes().splitlines()
    ]
    return sorted((json.loads(line) for line in lines), key=lambda row: row["index"])


@pytest.mark.usefixtures("one_device")
def test_scores_and_reports(evaluate, capsys):
    out = evaluate()
    report = json.loads((out / "report.json").read_text())
    task = report["tasks"]["xsum"]
    assert task["examples"] == 4 and task["sources_cut"] == 0
    # Three references are what the model learned by heart, and the fourth is not.
    assert task["scores"]["perplexity"]["value"] > 1 and task["scores"]["bits_per_byte"]
    assert 0 <= task["scores"]["calibration_error"]["value"] <= 100
    assert task["not_measured"] == []
    rouge = task["scores"]["rougeL"]
    assert rouge["value"] == pytest.approx(75) and rouge["low"] <= 75 <= rouge["high"]
    assert report["model"]["parameters"] > 0 and report["decoding"]["kind"] == "greedy"
    assert report["judge"] is None and "No judge was asked" in (out / "report.md").read_text()
    assert "| xsum | rougeL | 75.00 |" in capsys.readouterr().out
    assert [row["prediction"] for row in rows_of(out)] == [text for _, text in LEARNED]


def test_decoder_only_models_too(evaluate, decoder_only_run):
    rows = rows_of(evaluate(checkpoint=decoder_only_run))
    assert [row["prediction"] for row in rows] == [text for _, text in LEARNED]


@pytest.mark.usefixtures("one_device")
def test_what_is_there_is_not_made_again(evaluate, monkeypatch):
    out = evaluate()
    before = json.loads((out / "report.json").read_text())
    monkeypatch.setattr("encdec.inference.generator.Generator.generate", None)
    monkeypatch.setattr(
        "encdec.evaluation.likelihood.LikelihoodModel.of", lambda self, examples, on_batch: []
    )
    evaluate()
    assert json.loads((out / "report.json").read_text()) == before
    with pytest.raises(ConfigError, match="temperature is 0.0 there and 0.5 here"):
        evaluate("--temperature=0.5")


@pytest.mark.usefixtures("one_device")
def test_a_line_cut_short_is_made_again(evaluate):
    out = evaluate()
    path = out / "xsum" / "predictions-00000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    evaluate()
    assert rows_of(out) == [json.loads(line) for line in whole.splitlines()]
    path.write_bytes(whole.replace(b"one fish", b"two fish"))
    with pytest.raises(DataError, match="answers another source than example 0"):
        evaluate()


@pytest.mark.usefixtures("one_device")
def test_processes_share_the_windows_out(evaluate, monkeypatch):
    alone = rows_of(evaluate())
    monkeypatch.setattr("encdec.evaluation.predictions.WINDOW", 1)
    out = evaluate("--shard=1/2", out="two")
    assert len(rows_of(out)) == 2 and not (out / "report.json").exists()
    evaluate("--shard=0/2", out="two")
    assert rows_of(out) == alone
    report = json.loads((out / "report.json").read_text())
    assert report["tasks"]["xsum"]["scores"]["rougeL"]["value"] == pytest.approx(75)
    assert open_windows(5, {0, 3}, 0, 2) == [range(2, 3), range(4, 5)]


def test_processes_that_finish_tasks_in_another_order_leave_a_report(
    encoder_decoder_run, data_dir, tmp_path, monkeypatch
):
    shutil.copytree(data_dir / "xsum", tmp_path / "data" / "xsum")
    shutil.copytree(data_dir / "xsum", tmp_path / "data" / "dialogsum")
    monkeypatch.setattr("encdec.evaluation.predictions.WINDOW", 1)
    call = lambda shard: main(
        [
            f"--checkpoint={encoder_decoder_run}",
            "--tasks=xsum,dialogsum",
            "--batch_rows=2",
            f"--data_dir={tmp_path / 'data'}",
            f"--out={tmp_path / 'out'}",
            "--resamples=20",
            "--no_likelihood",
            f"--shard={shard}/2",
        ]
    )
    append, calls = PredictionFiles.append, []

    def interrupted(self, shard, made):
        append(self, shard, made)
        calls.append((self.directory.name, shard))
        if calls[-1:] == [("dialogsum", 0)] and ("xsum", 1) not in calls:
            call(1)  # the other process begins when this one is at its last task

    monkeypatch.setattr(PredictionFiles, "append", interrupted)
    assert call(0) == 0
    assert {name for name, shard in calls if shard == 1} == {"xsum", "dialogsum"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [part["examples"] for part in report["tasks"].values()] == [4, 4]
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.usefixtures("one_device")
def test_sources_that_are_too_long(evaluate):
    with pytest.raises(DataError, match="1 of 4 sources are longer than the 9 tokens"):
        evaluate("--max_input_tokens=9", "--too_long=refuse", "--max_examples=4")
    out = evaluate("--max_input_tokens=9", "--too_long=skip", out="skip")
    task = json.loads((out / "report.json").read_text())["tasks"]["xsum"]
    assert task["sources_skipped"] == 1
    rows = rows_of(out)
    assert [row["finish"] == "skipped" for row in rows] == [
        len(source) + 1 > 9 for source, _ in LEARNED
    ]
    out = evaluate("--max_input_tokens=9", out="cut")
    assert [row["source_cut"] for row in rows_of(out)] == [
        len(source) + 1 > 9 for source, _ in LEARNED
    ]


@pytest.mark.usefixtures("one_device")
def test_empty_sources_are_named_skipped_and_counted(evaluate, tmp_path, capsys):
    folder = tmp_path / "data" / "xsum"
    folder.mkdir(parents=True)
    with open(folder / "validation.jsonl", "w") as file:
        for source, target in [*LEARNED[:2], (" \n", "red."), *LEARNED[2:]]:
            file.write(json.dumps({"source": source, "target": target}) + "\n")
    out = evaluate(f"--data_dir={folder.parent}")
    assert "xsum: the sources of 1 examples are empty and skipped, with an empty answer: 2\n" in (
        capsys.readouterr().err
    )
    task = json.loads((out / "report.json").read_text())["tasks"]["xsum"]
    assert task["sources_empty"] == task["sources_skipped"] == task["empty_answers"] == 1
    assert task["scores"]["exact_match" if "exact_match" in task["scores"] else "rougeL"][
        "value"
    ] == pytest.approx(80)
    assert task["scores"]["perplexity"]["examples"] == 4
    assert (
        "Empty sources of xsum, skipped with an empty answer: 1" in (out / "report.md").read_text()
    )
    assert [row["prediction"] for row in rows_of(out)] == [
        *(text for _, text in LEARNED[:2]),
        "",
        *(text for _, text in LEARNED[2:]),
    ]


def constant(self, texts, settings, *, truncate, first_number, on_batch):
    return [[Generation("red.", [1, 2], [0.0, 0.0], "eos", 0.0)] for _ in texts]


@pytest.mark.usefixtures("one_device")
def test_shuffled_sources_take_the_score_of_a_model_that_reads_and_no_others(
    evaluate, monkeypatch, capsys
):
    out = evaluate("--shuffle_sources")
    report = json.loads((out / "report.json").read_text())["tasks"]["xsum"]
    own, shuffled = report["scores"], report["shuffled_sources"]
    assert own["rougeL"]["value"] == pytest.approx(75) and shuffled["sources_kept"] == 0
    assert shuffled["scores"]["rougeL"]["value"] == 0
    difference = shuffled["scores"]["rougeL"]["difference"]
    assert difference["value"] == -75 and difference["low"] <= -75 <= difference["high"] < 0
    # What it was taught is less likely after another's source.
    assert shuffled["scores"]["bits_per_byte"]["difference"]["value"] > 0.1
    assert "| xsum | rougeL | 75.00 | 0.00 |" in capsys.readouterr().out
    plain = evaluate(out="plain")
    assert rows_of(plain) == rows_of(out)
    assert json.loads((plain / "report.json").read_text())["tasks"]["xsum"]["scores"] == own
    monkeypatch.setattr("encdec.inference.generator.Generator.generate", constant)
    out = evaluate("--shuffle_sources=3", "--no_likelihood", out="constant")
    report = json.loads((out / "report.json").read_text())["tasks"]["xsum"]
    for name, score in report["scores"].items():
        other = report["shuffled_sources"]["scores"][name]
        assert other["value"] == score["value"] and other["difference"]["low"] == 0
    assert report["scores"]["rougeL"]["value"] == 25


@pytest.fixture
def own_metrics():
    """What a test registers ends with it."""
    with mock.patch.dict(METRICS):
        yield


@pytest.mark.usefixtures("own_metrics")
def test_files_of_the_users_own_need_no_task(encoder_decoder_run, tmp_path, capsys, monkeypatch):
    """Fields by flag, metrics by name, one of them from a module; every reference counts."""
    with open(tmp_path / "mine.v2.jsonl", "w") as file:
        for (source, _), texts in zip(LEARNED, WANTED):
            row = {"question": source, "answer": texts[0], "targets": texts}
            file.write(json.dumps(row) + "\n")
    (tmp_path / "my_metrics.py").write_text(
        "from encdec.metrics.metric_registry import METRICS, register\n"
        "from encdec.metrics.score import Metric, mean_score\n"
        "def length(references, predictions):\n"
        "    return mean_score('letters', [len(text) for text in predictions])\n"
        "if 'letters' not in METRICS:\n"
        "    register(Metric('letters', 'letters of an answer', length, ('letters',)))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    call = [
        f"--checkpoint={encoder_decoder_run}",
        "--jsonl=mine.v2.jsonl",
        "--source_field=question",
        "--target_field=answer",
        "--module=my_metrics",
        "--batch_rows=2",
        "--resamples=20",
        "--no_likelihood",
    ]
    assert main([*call, "--metrics=exact_match,rougeL_stemmed,letters", "--out=out"]) == 0
    task = json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]["mine"]
    assert list(task["scores"]) == ["exact_match", "rougeL_stemmed", "letters"]
    assert task["scores"]["exact_match"]["value"] == 75
    assert task["scores"]["letters"]["value"] == np.mean([len(text) for _, text in LEARNED])
    assert "- letters: letters of an answer" in capsys.readouterr().out
    # Compared by the same metrics, which the report names.
    main(["compare", "--first=A=out", "--second=B=out", "--module=my_metrics", "--resamples=9"])
    assert "| mine | letters |" in capsys.readouterr().out
    refusals = {
        "--metrics=rouge_k": "unknown metric 'rouge_k'",
        "--module=nothing": "--module=nothing cannot be imported",
        "--split=test": "--split is 'test', which needs --tasks",
        "--jsonl=nothing.jsonl": "nothing.jsonl not found",
        "--target_field=reply": "mine.v2.jsonl:1: no 'reply'",
    }
    for flag, message in refusals.items():
        with pytest.raises((ConfigError, DataError), match=message):
            main([*call, flag, "--out=never"])
    with pytest.raises(ConfigError, match="nothing to evaluate on; give --tasks=A,B or --jsonl"):
        main([call[0], "--out=never"])
    with pytest.raises(ConfigError, match="--source_field is 'x', which needs --jsonl"):
        main([call[0], "--tasks=xsum", "--source_field=x", "--out=never"])
    assert not (tmp_path / "never").exists()


def test_a_call_from_python_gives_the_report(encoder_decoder_run, tmp_path):
    examples = tuple(Example(source, tuple(texts)) for (source, _), texts in zip(LEARNED, WANTED))
    settings = EvaluationSettings(
        str(encoder_decoder_run), str(tmp_path), batch_rows=2, resamples=20, likelihood=False
    )
    report = evaluate_examples(settings, [Examples("four", examples, ("exact_match",))])
    assert report["tasks"]["four"]["scores"]["exact_match"]["value"] == 75
    assert read_report(tmp_path) == report


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--shuffle_sources=-1", "shuffle_sources is -1; expected 0 or more"),
        ("--max_examples=-1", "max_examples is -1; expected 1 or more"),
        ("--max_examples=0", "max_examples is 0; expected 1 or more"),
        ("--batch_rows=0", "batch_rows is 0; expected 1 or more"),
        ("--max_input_tokens=0", "max_input_tokens is 0; expected 2 or more"),
        ("--max_input_tokens=1", "max_input_tokens is 1; expected 2 or more"),
        ("--resamples=0", "resamples is 0; expected 1 or more"),
        ("--metrics=,", "--metrics is ',', which has an empty part"),
    ],
)
def test_numbers_out_of_range_are_named(flag, message, evaluate):
    with pytest.raises(ConfigError, match=message):
        evaluate(flag)


def test_directories_of_other_commands_are_left_alone(evaluate, encoder_decoder_run):
    with pytest.raises(ConfigError, match="holds a model; give a directory of its own"):
        evaluate(f"--out={encoder_decoder_run}")
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        evaluate(f"--out={__file__}/x")


@pytest.mark.usefixtures("one_device")
def test_bad_rows_are_named_without_a_flag_that_is_not_there(evaluate, tmp_path):
    (tmp_path / "data" / "xsum").mkdir(parents=True)
    (tmp_path / "data" / "xsum" / "validation.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"validation\.jsonl:1: no ") as caught:
        evaluate(f"--data_dir={tmp_path / 'data'}")
    assert "max_bad_rows" not in str(caught.value)


@pytest.mark.usefixtures("one_device")
def test_an_imported_model_is_evaluated_too(evaluate, encoder_decoder_run, tmp_path):
    config, params, _ = load_params_for_inference(encoder_decoder_run)
    write_model(
        tmp_path / "imported",
        config,
        jax.tree.map(np.asarray, params),
        source={"format": "hf", "family": "t5", "name": "theirs"},
        vocabulary=load_vocabulary("bytes"),
        framing=Framing(0),
        max_length=48,
    )
    out = evaluate(checkpoint=tmp_path / "imported")
    model = json.loads((out / "report.json").read_text())["model"]
    assert model["name"] == "imported" and model["training_flops"] is None
    assert model["origin"] == "imported from theirs (t5)"
    title, _, line, *_ = (out / "report.md").read_text().splitlines()
    assert title == "# Evaluation of imported"
    parameters = f"{model['parameters']:,} parameters"
    assert line == f"encoder-decoder, {parameters}, {model['origin']}; greedy decoding."


def test_a_task_without_data_names_the_command(encoder_decoder_run, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"put it at squad_v2/validation\.jsonl"):
        main(
            [
                f"--checkpoint={encoder_decoder_run}",
                "--tasks=squad_v2",
                f"--data_dir={tmp_path}",
                f"--out={tmp_path / 'out'}",
            ]
        )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="build it with `tfds build squad/v2.0`"):
        main(
            [f"--checkpoint={encoder_decoder_run}", "--tasks=squad_v2", f"--out={tmp_path / 'out'}"]
        )
    with pytest.raises(ConfigError, match="--shard is '2/2'"):
        main(["--checkpoint=x", "--tasks=xsum", "--out=y", "--shard=2/2"])
    with pytest.raises(ConfigError, match="--shard is '0/²'"):
        main(["--checkpoint=x", "--tasks=xsum", "--out=y", "--shard=0/²"])


def test_the_best_step_has_the_least_held_out_loss(encoder_decoder_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(encoder_decoder_run, run)
    with pytest.raises(ConfigError, match="has a finite held-out loss"):
        chosen_step(run, "best")
    with pytest.raises(ConfigError, match="has a finite held-out loss"):
        chosen_step(shipped.model_directory("java2cs"), "best")
    with pytest.raises(ConfigError, match="expected a number, or best"):
        chosen_step(run, "²")
    last = chosen_step(run, "120")
    with open(run / "metrics.jsonl", "a") as file:
        for step, loss in ((60, 0.5), (last, 0.7)):
            file.write(json.dumps({"step": step, "eval/loss": loss}) + "\n")
    shutil.copytree(run / "checkpoints" / str(last), run / "checkpoints" / "110")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "eval/loss": NaN}\n')
    # Of step 60 there is no checkpoint left, and a NaN is less than nothing.
    assert chosen_step(run, "best") == 120
