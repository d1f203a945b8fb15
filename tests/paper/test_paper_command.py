"""``encdec paper`` on a tiny corpus: the whole table, resuming, what is equal and what counted."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
import types

import pytest

from encdec.cost.flops import count_parameters, training_flops
from encdec.data import task_registry
from encdec.data.records import open_records
from encdec.errors import ConfigError, DataError, NonFiniteError
from encdec.evaluation.examples import Example, Examples, of_task
from encdec.model import preset
from encdec.paper import costs, result_rows, runs
from encdec.paper.comparison import comparison_markdown
from encdec.paper.corpora import Corpora, evenly
from encdec.paper.paper_command import load_config, main
from encdec.paper.result_rows import read_results, score_of
from encdec.paper.runs import evaluations
from encdec.paper.setting import (
    TEACHER,
    model_of,
    parse_setting,
    planned,
    run_config,
    slug,
    steps_of,
    table_rows,
)
from encdec.result_lines import setting_digest
from encdec.train.run_fields import DistillConfig

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "paper.py"
TINY = """
import importlib.util
spec = importlib.util.spec_from_file_location("paper", {path!r})
paper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper)

def get_config():
    config = paper.laptop()
    config.model, config.teacher, config.teacher_layers = "test", "micro-1m-dec", 2
    config.splits, config.distilled = ("2/3",), ("ED 2/3-1/3",)
    config.answers, config.dropout = ("ED 2/3-1/3",), 0.1
    config.vocabulary, config.vocabulary_bytes, config.seeds = 340, 100_000, 1
    config.optimizer.name = "adamw"  # compiles sooner
    # As the column's rows and steps: one program trains both.
    config.pretrain.inputs, config.pretrain.targets, config.pretrain.steps = 64, 32, 3
    config.pretrain.batch_size = 8
    config.pretrain.document_bytes, config.pretrain.held_out_every = 60, 3
    config.columns = type(config)()
    config.columns.code = paper.column(("code_java2cs",), 64, 32, 8, 3, "skip", 10, 3)
    config.columns.code.evaluated_inputs = 400
    return config
"""
SENTENCE = "the quick brown fox jumps over the lazy dog and runs through the old wood"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "config.py").write_text(TINY.format(path=str(CONFIG)))
    words = SENTENCE.split()
    with open(folder / "text.jsonl", "w") as file:
        for i in range(9):
            file.write(json.dumps({"text": " ".join(words[i:] + words[:i]) * 3}) + "\n")
    for split, count in (("train", 40), ("validation", 8)):
        path = folder / "data" / split / "code_java2cs.jsonl"
        path.parent.mkdir(parents=True)
        with open(path, "w") as file:
            for i in range(count):
                # Every fourth is too long for a row.
                text = f"int {words[i % 9]}() {{return {i};}}" * (9 if i % 4 == 0 else 1)
                file.write(json.dumps({"source": text, "target": text.upper()[:40]}) + "\n")
    return folder


def arguments(inputs, work, *more):
    return [
        f"--config={inputs / 'config.py'}",
        f"--data_dir={inputs / 'data'}",
        f"--text={inputs / 'text.jsonl'}",
        f"--workdir={work}",
        *more,
    ]


def test_every_model_is_timed_and_joins_the_rows(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(costs, "STEPS", 1)
    monkeypatch.setattr(costs, "REPEATS", 1)
    monkeypatch.setattr(costs, "table_rows", lambda _: {"ED 2/3-1/3": "2/3"})
    monkeypatch.setattr(costs, "INPUTS", 8)
    monkeypatch.setattr(costs, "NEW_TOKENS", 4)
    results = tmp_path / "results.jsonl"
    given = [f"--config={inputs / 'config.py'}", f"--results={results}", "--remark=a test"]
    assert main(["costs", *given]) == 0
    rows = {row["row"]: row for row in read_results(results)}
    assert set(rows) == {"ED 2/3-1/3", TEACHER}
    setting = parse_setting(load_config(f"{inputs / 'config.py'}").to_dict())
    for name, row in rows.items():
        assert (row["kind"], row["remark"], row["inputs"]) == ("costs", "a test", 8)
        before = setting.pretrain.steps * row["pretraining_step_seconds"]
        assert row["training_seconds"] == pytest.approx(3 * row["step_seconds"] + before)
        assert 0 < before < row["training_seconds"]
        assert row["first_token_seconds"] > 0 and row["tokens_per_second"] > 0
        assert row["memory_bytes"] > 4 * count_parameters(model_of(setting, name)).total
    assert "ms per step" in capsys.readouterr().err
    assert main(["table", str(results)]) == 0


def test_all_that_is_read_is_in_the_fingerprint(inputs, tmp_path):
    """Sources, references, order and split of the examples, and the text; not where they are."""
    setting = parse_setting(load_config(f"{inputs / 'config.py'}").to_dict())
    pairs = {"train": ["ab", "cd"], "validation": ["ef"]}
    variants = [
        (pairs, "xy"),
        (pairs, "xz"),
        ({**pairs, "train": ["ac", "cd"]}, "xy"),
        ({**pairs, "train": ["bb", "cd"]}, "xy"),
        ({**pairs, "train": ["cd", "ab"]}, "xy"),
        ({**pairs, "validation": ["eg"]}, "xy"),
        ({"train": ["ab"], "validation": ["cd", "ef"]}, "xy"),
        (pairs, "xy"),
    ]
    found = []
    for number, (splits, text) in enumerate(variants):
        data = tmp_path / f"data{number}"
        for split, rows in splits.items():
            (data / split).mkdir(parents=True)
            lines = [json.dumps({"source": one, "target": two}) for one, two in rows]
            (data / split / "code_java2cs.jsonl").write_text("\n".join(lines))
        (data / "text.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in text))
        work = tmp_path / f"work{number}"
        work.mkdir()
        corpora = Corpora(setting, work, str(data), [str(data / "text.jsonl")])
        corpora._claim_data({})
        found.append(corpora.data)
    assert found[0] == found.pop() and len(set(found)) == len(found)
    # Interrupted before the excerpts were written, it needs the text again.
    with pytest.raises(DataError, match="give files with --text=FILE"):
        Corpora(setting, work, str(data), []).make(print)


def test_an_older_work_directory_takes_the_data_that_it_was_made_from(inputs, tmp_path):
    """One from before there were fingerprints, whose files are compared instead."""
    config = load_config(str(inputs / "config.py"), ["--config.pretrain.steps=0"])
    setting = parse_setting(config.to_dict())
    Corpora(setting, tmp_path, str(inputs / "data"), []).make(print)
    (tmp_path / "data.json").unlink()
    Corpora(setting, tmp_path, str(inputs / "data"), []).make(print)
    for split in ("train", "validation"):
        (tmp_path / "data.json").unlink(missing_ok=True)
        other = tmp_path / split
        shutil.copytree(inputs / "data", other)
        path = other / split / "code_java2cs.jsonl"
        path.write_text(path.read_text().replace("};", "} ;").replace("RETURN", "RETURNS"))
        with pytest.raises(DataError, match=f"not in --data_dir={other}; give the one"):
            Corpora(setting, tmp_path, str(other), []).make(print)
        assert not (tmp_path / "data.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_all_runs_of_a_student_and_again(inputs, tmp_path, capsys, monkeypatch):
    student = "--rows=ED 2/3-1/3"
    assert main(arguments(inputs, tmp_path, student)) == 0
    content = json.loads((tmp_path / "table.json").read_text())
    measured = {row["model"] for row in content["rows"] if "code_java2cs" in row["ours"]}
    assert measured == {TEACHER, "ED 2/3-1/3", "ED 2/3-1/3+KD", "ED 2/3-1/3+SeqKD"}
    counts = json.loads((tmp_path / "counts.json").read_text())
    # Evaluation reads what is too long for a row, too.
    assert counts["code_java2cs"]["validation"] == {"found": 8, "too_long": 2, "taken": 3}
    # Two of 40 are held out; the tenth of 38 that is too long is not among them.
    assert counts["code_java2cs"]["train"] == {"found": 38, "too_long": 10, "taken": 10}
    assert counts["pretrain"]["train_documents"] == 6
    assert counts["pretrain"]["train_bytes"] == 6 * 60
    report = json.loads(
        (tmp_path / "runs" / "ed-2of3-code-kd-0" / "evaluation" / "report.json").read_text()
    )
    assert report["tasks"]["code_java2cs"]["examples"] == 3
    assert report["model"]["training_flops"] > 0
    assert report["tasks"]["code_java2cs"]["sources_cut"] == 0
    rows = read_results(tmp_path / "results.jsonl")
    assert (rows[0]["kind"], rows[0]["examples"]) == ("copy", 3)
    [data] = {row["data"] for row in rows}
    rows = rows[1:]
    assert [(row["row"], row["seed"]) for row in rows] == [
        ("ED 2/3-1/3", 0),
        (TEACHER, 0),
        ("ED 2/3-1/3+KD", 0),
        ("ED 2/3-1/3+SeqKD", 0),
    ]
    for row in rows:
        for name in ("bleu_codexglue", "exact_match"):
            rebuilt = score_of(row, "greedy", name)
            assert rebuilt.value == pytest.approx(row["scores"]["greedy"][name]["value"], abs=1e-5)
        bits = score_of(row, "greedy", "bits_per_byte")
        assert bits.value == pytest.approx(
            row["scores"]["greedy"]["bits_per_byte"]["value"], abs=1e-4
        )
    assert main(["table", str(tmp_path / "results.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "| ED 2/3-1/3+KD minus ED 2/3-1/3 | 1 |" in shown and "BLEU, shuffled sources" in shown
    # The end of the run shows the same tables, not the paper's, of which one task was run.
    before = (tmp_path / "table.md").read_text()
    assert shown.count(before) == 2 and "XSum" not in shown
    monkeypatch.setattr("encdec.paper.runs.train", None)
    monkeypatch.setattr("encdec.paper.runs.evaluate", None)
    monkeypatch.setattr("encdec.paper.runs.store_teacher_logits", None)
    assert main(arguments(inputs, tmp_path, student)) == 0
    assert (tmp_path / "table.md").read_text() == before
    assert before in capsys.readouterr().out
    # Another machine continues from the rows alone.
    moved = tmp_path / "moved"
    results = f"--results={tmp_path / 'results.jsonl'}"
    assert main(arguments(inputs, moved, student, results)) == 0
    assert not (moved / "runs").exists()
    assert len(read_results(tmp_path / "results.jsonl")) == 5
    # The same settings on other data are another experiment.
    lines = (tmp_path / "results.jsonl").read_text()
    other = tmp_path / "data"
    shutil.copytree(inputs / "data", other)
    with open(other / "train" / "code_java2cs.jsonl", "a") as file:
        file.write(json.dumps({"source": "new", "target": "NEW"}) + "\n")
    with pytest.raises(DataError, match="from other data: code_java2cs is .*--data_dir"):
        main(arguments(inputs, tmp_path, student, f"--data_dir={other}"))
    again = tmp_path / "again"
    monkeypatch.setattr("encdec.paper.runs.Experiment._do", lambda self, run: None)
    assert main(arguments(inputs, again, results, f"--data_dir={other}")) == 0
    assert f"4 lines of these settings on other data ({data};" in capsys.readouterr().err
    assert len(read_results(tmp_path / "results.jsonl")) == 6  # its own copies
    (tmp_path / "results.jsonl").write_text(lines.replace(f'"data": "{data}", ', ""))
    with pytest.raises(DataError, match=f'4 lines of these .* add "data": "{data}" to each'):
        main(arguments(inputs, tmp_path, student))
    with pytest.raises(ConfigError, match=r"other settings: pretrain.steps is .* and 4 here"):
        main(arguments(inputs, tmp_path, "--config.pretrain.steps=4"))


MODULE = """
from encdec.tasks import FileTask, register_task

register_task(
    FileTask(
        "shouting",
        "words in capitals",
        fields=("text",),
        document=lambda row: ("Shout: " + row["text"], row["text"].upper()),
        splits={"train": None, "validation": None},
        metrics=("exact_match",),
    )
)
"""


def test_a_task_of_a_users_module_takes_part(inputs, tmp_path, monkeypatch):
    """Its rows by its preprocessor are what is trained on; evaluation finds them and its metric."""
    (tmp_path / "my_paper_tasks.py").write_text(MODULE)
    config = (inputs / "config.py").read_text().replace("code_java2cs", "shouting")
    (tmp_path / "config.py").write_text(config)
    for split, count in (("train", 30), ("validation", 5)):
        rows = [json.dumps({"text": f"{split} {n}"}) for n in range(count)]
        folder = tmp_path / "data" / "shouting"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("encdec.paper.runs.Experiment.run", lambda self: "")
    given = ["--config=config.py", "--data_dir=data", f"--text={inputs / 'text.jsonl'}"]
    with pytest.raises(DataError, match="unknown task 'shouting'.*--module"):
        main([*given, "--workdir=without"])
    try:
        assert main([*given, "--workdir=work", "--module=my_paper_tasks"]) == 0
        written = [
            json.loads(line)
            for line in pathlib.Path("work/tasks/train/shouting.jsonl").read_text().splitlines()
        ]
        assert written[1] == {
            "source": "Shout: train 2",
            "target": "TRAIN 2",
            "targets": ["TRAIN 2"],
        }
        counts = json.loads(pathlib.Path("work/counts.json").read_text())["shouting"]
        assert counts["train"]["taken"] == 10 and counts["validation"]["found"] == 5
        records = open_records("work/records/code-train")
        assert records.card.examples == 10
        task = of_task("shouting", "work/tasks", "validation")
        assert task.metrics == ("exact_match",)
        assert task.examples[0].references == ("VALIDATION 0",)
    finally:
        for tasks in (task_registry.TEXT_TASKS, task_registry.FILE_TASKS):
            tasks.pop("shouting", None)
        sys.modules.pop("my_paper_tasks", None)


@pytest.mark.parametrize("size", ["laptop", "gpu", "dialogsum", "refinement"])
def test_students_cost_the_same_and_the_teacher_is_larger(size):
    setting = parse_setting(load_config(f"{CONFIG}:{size}").to_dict())
    # Without pretraining at the column's rows.
    shape = {"dialogsum": (512, 96), "refinement": (192, 128), "gpu": (1024, 256)}.get(
        size, (256, 64)
    )
    students = [row for row in table_rows(setting) if row != "DEC (parameters)"]
    assert students == ["DEC", "ED 2/3-1/3", "ED 1/2-1/2", "ED 1/3-2/3"]
    flops = [training_flops(model_of(setting, row), *shape) for row in students]
    assert max(flops) / min(flops) < 1.01
    assert [slug(row) for row in (*students, TEACHER)] == [
        "dec",
        "ed-2of3",
        "ed-1of2",
        "ed-1of3",
        "teacher",
    ]


def test_the_most_telling_runs_come_first():
    setting = parse_setting(load_config(f"{CONFIG}:codexglue").to_dict())
    runs = planned(setting)
    assert [(run.title, run.seed) for run in runs[:7]] == [
        ("ED 2/3-1/3", 0),
        ("DEC", 0),
        (TEACHER, 0),
        ("ED 2/3-1/3+KD", 0),
        ("DEC+KD", 0),
        ("ED 2/3-1/3+SeqKD", 0),
        ("DEC+SeqKD", 0),
    ]
    assert len(runs) == len(set(runs)) == 7 + 3 + 2 * 6  # others have one seed
    parameters = [
        count_parameters(model_of(setting, row)).total
        for row in ("ED 2/3-1/3", "DEC", "DEC (parameters)")
    ]
    assert parameters[2] / parameters[0] == pytest.approx(1, abs=0.01) and parameters[1] < (
        0.8 * parameters[0]
    )
    # Without pretraining the FLOPs of fine-tuning's rows are equal.
    flops = [training_flops(model_of(setting, row), 192, 192) for row in ("DEC", "ED 2/3-1/3")]
    assert flops[0] / flops[1] == pytest.approx(1, abs=0.01)
    assert slug("DEC (parameters)") == "dec-parameters"
    assert evaluations(setting) == [("evaluation", 1), ("evaluation-beam", 5)]


def test_the_teacher_s_weight_is_that_of_its_pupils_alone():
    setting = parse_setting(
        load_config(f"{CONFIG}:codexglue", ["--config.distill.alpha=0.5"]).to_dict()
    )
    data = {"records": "", "eval_records": "", "batch_size": 2, "steps": 40, "seed": 0}
    assert run_config(setting, "DEC", **data).distill == DistillConfig()
    assert run_config(setting, "DEC", **data, teacher="t").distill.alpha == 0.5


def test_a_teacher_of_its_own_steps_leaves_the_lines_of_untaught_students_valid():
    lines = read_results(REPOSITORY / "docs" / "results" / "codexglue.jsonl")
    settings = lambda name: {row["setting"] for row in lines if row.get("row") == name}
    [recorded] = settings("DEC")
    plain = parse_setting(load_config(f"{CONFIG}:codexglue").to_dict())
    digest = lambda setting, taught: setting_digest(setting.identity(taught))
    assert digest(plain, True) == digest(plain, False) == recorded
    flags = ["--config.teacher_steps=6000", "--config.teacher_dropout=0.2"]
    longer = parse_setting(load_config(f"{CONFIG}:codexglue", flags).to_dict())
    assert digest(longer, False) == recorded
    assert settings(TEACHER) == {recorded, digest(longer, True)}
    assert {run.title for run in planned(longer) if not run.with_teacher} == set(table_rows(longer))
    [column] = longer.columns
    assert (steps_of(longer, TEACHER, column), steps_of(longer, "DEC", column)) == (6000, 3000)
    assert steps_of(plain, TEACHER, column) == 3000
    assert model_of(longer, TEACHER) == model_of(plain, TEACHER).replace(
        mlp_dropout=0.2, residual_dropout=0.2
    )
    assert model_of(longer, "DEC") == model_of(plain, "DEC")
    for wrong in ("1", "-2", "-0.5"):  # and -1.0 alone means "as the students"
        flags = [f"--config.teacher_dropout={wrong}"]
        with pytest.raises(ConfigError, match=r"config.teacher_dropout \S+; expected"):
            parse_setting(load_config(f"{CONFIG}:codexglue", flags).to_dict())


def test_parts_are_those_of_the_tasks_scores_and_give_them_again(tmp_path, monkeypatch):
    """Rouge of summaries, as DialogSum's script has it: rouge-score with the stemmer."""
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [("The dogs were running home.", "a dog runs home"), ("She said no.", "he says no")]
    answers = [
        (None, i, types.SimpleNamespace(references=[gold]), types.SimpleNamespace(text=text))
        for i, (gold, text) in enumerate(pairs)
    ]
    monkeypatch.setattr(result_rows, "read_answers", lambda folder: answers)
    parts = result_rows._parts(tmp_path, ["rougeL_stemmed", "exact_match"])
    assert list(parts) == ["rougeL_stemmed", "exact_match"]
    rebuilt = score_of({"parts": {"greedy": parts}}, "greedy", "rougeL_stemmed")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [100 * scorer.score(*pair)["rougeL"].fmeasure for pair in pairs]
    assert rebuilt.value == pytest.approx(sum(expected) / 2, abs=1e-3) and min(expected) > 30
    assert score_of({"parts": {"greedy": parts}}, "greedy", "bleu_codexglue") is None


def line(name, seed=0, value=50.0, right=(1, 0) * 20, **changed):
    """A run's row, of one score."""
    return {
        **{"kind": "run", "row": name, "task": "t", "column": "c", "seed": seed},
        **{"setting": "s", "data": "d", "layers": [0, 2], "parameters": 10},
        "training_flops": 1e9,
        "scores": {"greedy": {"exact_match": {"value": value, "low": 0, "high": 100}}},
        "shuffled": {},
        "parts": {"greedy": {"exact_match": [[100 * hit, 1] for hit in right]}},
        **changed,
    }


def lost(name, seed=0, **changed):
    """The row of a run that diverged."""
    nothing = {"scores": {}, "shuffled": {}, "parts": {}, "diverged": "step 7: loss is nan"}
    return line(name, seed, **nothing, **{"training_flops": 1e8, **changed})


def test_rows_of_several_seeds_are_compared_over_those_that_both_have():
    rows = [line("DEC", seed, 50.0 + seed) for seed in (0, 1, 2)]
    rows += [line("ED 2/3-1/3", seed, right=[1, 1] * 20) for seed in (0, 1)]
    page = comparison_markdown(rows, trials=100)
    assert "| DEC | 3 | 51.00 [48.52, 53.48] (n=3) |" in page
    assert "| ED 2/3-1/3 minus DEC | 2 | +50.00" in page and "BLEU" not in page


def test_what_diverged_is_shown_and_in_no_mean():
    rows = [lost("DEC"), line("DEC", 1), line("DEC", 2), line("ED 2/3-1/3"), line("ED 2/3-1/3", 1)]
    rows.append(lost("DEC (parameters)"))
    page = comparison_markdown(rows, trials=100)
    assert "| DEC | 3 | 50.00 [50.00, 50.00] (n=2); 1 diverged |" in page
    assert "| DEC (parameters) | 1 | diverged |" in page
    assert "| DEC | 2 | 10 | 1e+09 |" in page  # the cost of a run that ended
    assert "| ED 2/3-1/3 minus DEC | 1; 1 diverged | +0.00" in page
    assert "| ED 2/3-1/3 minus DEC (parameters) | 0; 1 diverged | – |" in page


def test_tasks_settings_teachers_and_data_have_tables_of_their_own():
    of = lambda name, **costs: {
        **{"kind": "costs", "column": "c", "setting": "s", "row": name, "remark": "quiet"},
        **{"device": "a", "date": "b", "first_token_seconds": 1, "tokens_per_second": 1},
        **{"training_seconds": 60.0, "memory_bytes": 1 << 20, **costs},
    }
    rouge = {"rouge1_stemmed": {"value": 30.0, "low": 1, "high": 2}}
    rows = [line("DEC"), line("DEC+KD"), line("DEC+KD", value=70.0, setting="s2", comparison="s")]
    rows += [line("DEC", value=10.0, data="d2")]
    rows += [line("DEC", column="c2", task="talks", scores={"greedy": rouge}, parts={})]
    rows += [of("DEC"), of("DEC", column="c2", training_seconds=120.0, remark="")]
    rows += [of("DEC", setting="s3", training_seconds=1e6)]
    rows += [line("teacher"), line("teacher", setting="s2", comparison="s")]
    rows += [of("teacher", training_seconds=6000.0)]
    rows += [
        {"kind": "copy", "task": "t", "setting": "s", "data": data, "scores": {"greedy": scores}}
        for data, scores in (("d", line("")["scores"]["greedy"]), ("d2", {}))
    ]
    page = comparison_markdown(rows, trials=100)
    first, other_data, other_teacher, talks = (
        page[page.index(title) :].split("\n## ")[0]
        for title in (
            "t (setting s, data d)",
            "t (setting s, data d2)",
            "t (setting s2, data d)",
            "talks\n",
        )
    )
    assert "| DEC | 1 | 50.00" in first and "| DEC+KD | 1 | 50.00" in first
    assert "| the source, copied | – | 50.00" in first and "| 1.0 | 1000.0 | 1 | 1.0 |" in first
    # The step of a student that learns from draws is not its plain one's.
    assert "| DEC+KD | 2 | 10 | 1e+09 | – | 1000.0 | 1 | 1.0 |" in first
    assert "Times: quiet, a, b." in first
    # Nor is one teacher's training another's.
    assert "| teacher | 2 | 10 | 1e+09 | 100.0 |" in first
    assert "| teacher | 2 | 10 | 1e+09 | – | – | – | – |" in other_teacher
    assert "| DEC | 1 | 50.00" in other_teacher and "| DEC+KD | 1 | 70.00" in other_teacher
    assert "| DEC | 1 | 10.00" in other_data and "KD" not in other_data
    assert "| the source, copied | – | – |" in other_data
    assert "| Rouge-1 |" in talks and "exact match" not in talks and "copied" not in talks
    assert "| 2.0 | 1000.0 |" in talks and "Times: a, b." in talks
    # Costs are not shown where there are none.
    assert "| DEC | 2 | 10 | 1e+09 | – | – | – | – |" in comparison_markdown([line("DEC")])


def test_copies_are_of_the_sources_without_their_instructions():
    examples = tuple(Example(f"Translate.\n{text}\nC#:\n", (text,)) for text in ("a b", "a\nc"))
    row = result_rows.copy_row(
        Examples("t", examples, ("exact_match",)), setting="s", data="d", column="c"
    )
    assert row["scores"]["greedy"]["exact_match"]["value"] == 100 and row["examples"] == 2
    assert result_rows.without_instructions(["a", "b"]) == ["a", "b"]
    assert result_rows.without_instructions(["a\nb"]) == ["b"]


@pytest.fixture
def experiment(inputs, tmp_path, monkeypatch):
    """A function that runs all of it, trainings imitated: those named end with a NaN at step 2."""
    corpora = types.SimpleNamespace(records=lambda *name: "/".join(name), data="d", tasks_dir="")
    monkeypatch.setattr(runs.Experiment, "_record_copies", lambda self: None)
    monkeypatch.setattr(runs.Experiment, "_draws", lambda self, column: "draws")
    monkeypatch.setattr(runs.Experiment, "_answers", lambda self, column: "answers")
    trained = []

    def evaluate(self, run, column, name, beams):
        report = self.folder(run) / name / "report.json"
        report.parent.mkdir()
        model = {"architecture": "a", "encoder_layers": 1, "decoder_layers": 1, "seed": run.seed}
        model |= {"parameters": 1, "step": 3}
        task = {"examples": 1, "scores": {}}
        report.write_text(json.dumps({"model": model, "tasks": {"code_java2cs": task}}))

    def run_all(diverging, *changes):
        def train(config, folder):
            trained.append(folder.name)
            folder.mkdir(parents=True, exist_ok=True)
            if folder.name in diverging:
                raise NonFiniteError("step 2: loss is nan", 2)
            (folder / "metrics.jsonl").write_text('{"step": 3, "eval/bits_per_byte": 1.0}\n')
            return types.SimpleNamespace(train={}, eval={"eval/loss": 1.0})

        monkeypatch.setattr(runs, "train", train)
        flags = [f"--config.{one}" for one in changes]
        setting = parse_setting(load_config(str(inputs / "config.py"), flags).to_dict())
        results, said = tmp_path / "results.jsonl", []
        trained.clear()
        runs.Experiment(setting, tmp_path, corpora, results, (), (), said.append).run()
        return list(trained), read_results(results), said

    monkeypatch.setattr(runs.Experiment, "_evaluate", evaluate)
    monkeypatch.setattr(result_rows, "_parts", lambda folder, names: {})
    return run_all


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(experiment, tmp_path):
    ended = ["ed-2of3-code-0", "teacher-code-0", "ed-2of3-code-kd-0", "ed-2of3-code-seqkd-0"]
    trained, rows, said = experiment(["ed-2of3-code-kd-0"], "pretrain.steps=0")
    assert trained == [*ended, "dec-code-0"]
    assert [row["row"] for row in rows if row["diverged"]] == ["ED 2/3-1/3+KD"]
    [row] = [row for row in rows if row["diverged"]]
    assert (row["diverged"], row["diverged_step"]) == ("step 2: loss is nan", 2)
    whole = next(row for row in rows if row["row"] == "ED 2/3-1/3")["training_flops"]
    assert row["training_flops"] == pytest.approx(whole * 2 / 3) and row["scores"] == {}
    assert "ed-2of3-code-kd-0: diverged, step 2: loss is nan" in said
    page = (tmp_path / "table.md").read_text()
    assert "Diverged, and in no figure: ED 2/3-1/3+KD on code, seed 0: step 2" in page
    assert json.loads((tmp_path / "table.json").read_text())["diverged"][0]["step"] == 2
    assert experiment([], "pretrain.steps=0")[0] == []  # unless its line is removed
    kept = [json.dumps(row) + "\n" for row in rows if not row["diverged"]]
    (tmp_path / "results.jsonl").write_text("".join(kept))
    assert experiment([], "pretrain.steps=0")[0] == ["ed-2of3-code-kd-0"]


def test_pupils_of_a_teacher_that_diverged_are_left_out(experiment):
    trained, rows, said = experiment(["teacher-code-0"], "pretrain.steps=0")
    assert trained == ["ed-2of3-code-0", "teacher-code-0", "dec-code-0"]
    assert "ed-2of3-code-kd-0: skipped, its teacher diverged" in said
    assert experiment([], "pretrain.steps=0")[0] == []


def test_no_fine_tuning_starts_from_a_pretraining_that_diverged(experiment):
    trained, rows, _ = experiment(["ed-2of3-pretrain"])
    assert trained.count("ed-2of3-pretrain") == 1 and "ed-2of3-code-0" not in trained
    lost = [row["row"] for row in rows if (row["diverged"] or "").startswith("in pretraining")]
    assert lost == ["ED 2/3-1/3", "ED 2/3-1/3+KD", "ED 2/3-1/3+SeqKD"]
    # It cost what was trained: two steps, that the first and the later ones are told of.
    step = training_flops(preset("test", vocab_size=340), 64, 32, batch_size=8)
    assert [row["training_flops"] for row in rows if row["row"] in lost] == [2 * step] * 3
    assert {"teacher-code-0", "dec-code-0"} < set(trained)


def test_mistakes_are_named_before_anything_is_run(inputs, tmp_path):
    config = f"{CONFIG}:laptop"
    with pytest.raises(ConfigError, match="expected at least 4 times as many"):
        parse_setting(load_config(config, ["--config.teacher_layers=1"]).to_dict())
    with pytest.raises(ConfigError, match="did you mean 'pretrain.steps'"):
        load_config(config, ["--config.pretrain.step=1"])
    with pytest.raises(ConfigError, match="code.too_long is 'drop'; expected one of 'skip', 'cut'"):
        parse_setting(load_config(config, ["--config.columns.code.too_long=drop"]).to_dict())
    twice = load_config(config).to_dict()
    twice["columns"]["again"] = twice["columns"]["code"]
    with pytest.raises(ConfigError, match="the task code_java2cs is 2 times in config.columns"):
        parse_setting(twice)
    with pytest.raises(ConfigError, match="is not in the paper"):
        parse_setting({**load_config(config).to_dict(), "splits": ("1/6",)})
    with pytest.raises(ConfigError, match="--columns names 'x'; known: code"):
        main(arguments(inputs, tmp_path, "--columns=x"))
    setting = parse_setting(load_config(str(inputs / "config.py")).to_dict())
    with pytest.raises(DataError, match="give files with --text=FILE"):
        Corpora(setting, tmp_path / "work", str(inputs / "data"), []).make(print)
    with pytest.raises(DataError, match=r"put it at code_java2cs/train\.jsonl"):
        Corpora(setting, tmp_path / "work", str(tmp_path), [str(inputs / "text.jsonl")]).make(print)


def test_evenly():
    pairs = [(str(i), ()) for i in range(10)]
    assert [int(source) for source, _ in evenly(pairs, 4)] == [0, 2, 5, 7]
    assert evenly(pairs, 0) == pairs == evenly(pairs, 11)
