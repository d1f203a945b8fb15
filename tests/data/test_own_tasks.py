"""A user's own module: tasks, mixtures, preprocessors and metrics, from docs/own-data.md."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import sys

import pytest

from encdec import cli
from encdec.data import registry, task_mixtures
from encdec.data.objectives import OBJECTIVES
from encdec.data.readers import BadRows
from encdec.data.records import open_records
from encdec.errors import ConfigError, DataError
from encdec.metrics import registry as metrics
from encdec.tasks import FileTask, PrefixLM, TextTask, register_mixture, register_task
from tests.data.conftest import write_jsonl

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "own-data.md").read_text()
REGISTRIES = (
    *(registry.TEXT_TASKS, registry.FILE_TASKS, task_mixtures.MIXTURES, task_mixtures.RATES),
    *(metrics.METRICS, OBJECTIVES),
)
ROWS = [{"question": f"What is {n}?", "answer": f"{n} is a number"} for n in range(12)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with the page's modules and rows; what they register is taken back."""
    kept = [dict(one) for one in REGISTRIES]
    path, modules = list(sys.path), set(sys.modules)
    for block in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", block)[1]
        (tmp_path / name).write_text(block)
    for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
        write_jsonl(tmp_path / "rows" / "faq" / f"{split}.jsonl", rows)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for one, content in zip(REGISTRIES, kept):
        one.clear()
        one.update(content)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def run(block: str) -> None:
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        words = shlex.split(line)
        assert words[0] == "encdec"
        assert cli.main(words[1:]) == 0, line


def test_the_pages_module_goes_from_listing_to_evaluation(folder, capsys):
    # A shorter run, and no likelihoods, which compile a program more.
    block = blocks("sh")[1].replace("--config.steps=20", "--config.steps=2")
    run(re.sub("every=10", "every=2", block).replace("--max_tokens=8", "--no_likelihood"))
    shown = capsys.readouterr().out
    write_csv = "question,answer\nWhy?,Because\n"
    pathlib.Path("questions.csv").write_text(write_csv)
    run(blocks("sh")[0])
    assert open_records("data/questions").card.examples == 1
    assert "faq: questions of our users" in shown and "Question: What is 0?\nAnswer:" in shown
    assert "faq_and_sums: mixture of faq, sums" in shown
    card = open_records("data/faq").card
    assert (card.task, card.examples, card.split) == ("faq", 12, "train")
    report = json.loads(pathlib.Path("runs/faq/evaluation/report.json").read_text())
    assert {name: task["examples"] for name, task in report["tasks"].items()} == {
        "faq": 3,
        "sums": 10,
    }
    assert "first_word" in report["tasks"]["faq"]["scores"]
    assert "exact_match" in report["tasks"]["sums"]["scores"]
    # Steps come from the task unless the command line says otherwise.
    config = cli.load("encdec.train.train_command:load_config")(f"{ROOT}/configs/finetune.py:faq")
    assert config.steps == 200
    mixture = cli.load("encdec.data.task_mixtures:task_or_mixture")("faq_and_sums", "rows")
    documents = list(mixture.documents("train", BadRows()))
    assert sum("Question" in source for source, _ in documents[:8]) == 6


def test_seqios_registry_is_read_up_to_its_tokens(folder):
    pytest.importorskip("seqio")
    run(blocks("sh")[2])
    records = open_records("data/shouts")
    vocabulary = records.vocabulary()
    from encdec.data.records import decode_row

    [row] = records.read([0])
    sources, targets = decode_row(row, records.card.token_dtype)
    pairs = {(vocabulary.decode(a), vocabulary.decode(b)) for a, b in zip(sources, targets)}
    assert pairs <= {("oak", "OAK"), ("elm", "ELM"), ("ash", "ASH")} and len(pairs) > 1
    assert records.card.examples == 12
    task = registry.text_task("shout")
    [name] = task.metrics
    [score] = metrics.metric_named(name).scores(["OAK", "ELM"], ["abc", "toolong"])
    assert (name, score.name, score.value) == ("shout.same_length", "same_length", 0.5)

    import seqio

    seqio.TaskRegistry.add(
        "noisy",
        source=seqio.TaskRegistry.get("shout").source,
        preprocessors=[seqio.preprocessors.tokenize, lambda dataset: dataset],
        output_features={"targets": seqio.TaskRegistry.get("shout").output_features["targets"]},
        metric_fns=[],
    )
    with pytest.raises(DataError, match="changes its tokens by <lambda>.*--objective"):
        registry.text_task("noisy")
    for name in ("noisy", "shout"):
        seqio.TaskRegistry.remove(name)
    seqio.MixtureRegistry.remove("shouts")


def test_names_are_kept_apart_and_mistakes_are_named(folder):
    own = TextTask("own", lambda split, bad_rows: iter([("a", "b")]))
    register_task(own)
    register_task(own)  # a module imported twice
    with pytest.raises(ConfigError, match="'own' is already registered"):
        register_task(TextTask("own", lambda split, bad_rows: iter([])))
    with pytest.raises(ConfigError, match="'xsum' is already registered"):
        register_task(FileTask("xsum", "", (), tuple, {"train": None}))
    with pytest.raises(ConfigError, match="named 'a b'"):
        register_task(TextTask("a b", lambda split, bad_rows: iter([])))
    with pytest.raises(ConfigError, match="'own' is already registered"):
        register_mixture("own", ("own",))
    with pytest.raises(ConfigError, match="rates"):
        register_mixture("mine", ("own", "xsum"), rates=(1,))
    with pytest.raises(DataError, match="--module"):
        registry.text_task("unknown")
    with pytest.raises(ConfigError, match="brings its own text"):
        registry.text_task("own", str(folder))
    assert cli.main(["prepare", "--module=absent", "--task=own", "--out=x"]) == 2
    register_task(TextTask("raw", lambda split, bad_rows: iter([("a",)]), PrefixLM()))
    load_config = cli.load("encdec.train.train_command:load_config")
    with pytest.raises(ConfigError, match="raw is text for pretraining"):
        load_config(f"{ROOT}/configs/finetune.py:raw")
    assert load_config(f"{ROOT}/configs/finetune.py").steps == 1_000


def test_ready_pairs_of_a_task_that_brings_its_own_text(folder):
    register_task(TextTask("own", lambda split, bad_rows: iter([("a", "b")]), splits=("train",)))
    write_jsonl(folder / "train" / "own.jsonl", [{"source": "c", "target": "d"}])
    documents = registry.text_task("own", str(folder)).documents("train", BadRows())
    assert list(documents) == [("c", "d")]
