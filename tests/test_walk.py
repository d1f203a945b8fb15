"""Pages run as they are printed: the walk of ten steps, tasks of one's own, the Python calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import jax
import pytest

from encdec.data.records import read_card
from encdec.safetensors import open_directory
from encdec.saved.saved_params import load_params_for_inference
from tests.data.conftest import write_jsonl
from tests.pages import ROOT, run_by

PAGES = {"docs/own-data.md", "docs/python.md", "docs/walk.md"}


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder that the blocks of all pages were run in, and what was printed there.

    One process, in which the pages' like models share their programs.
    """
    folder = tmp_path_factory.mktemp("walk")
    assert {block.page for block in run_by(__file__)} == PAGES
    (folder / "questions.csv").write_text("question,answer\nWhy?,Because\n")
    rows = [{"question": f"What is {n}?", "answer": f"{n} is a number"} for n in range(12)]
    write_jsonl(folder / "rows" / "faq" / "train.jsonl", rows)
    write_jsonl(folder / "rows" / "faq" / "validation.jsonl", rows[:3])
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_pages", "tests/test_walk.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout, done.stderr


def test_every_step_of_the_walk_gives_what_the_next_one_needs(walked):
    folder, out, err = walked
    # Stopped after its first report, and gone on to the end.
    step = int(re.search(r"preempted: step (\d+) is saved", err)[1])
    assert 10 <= step < 30 and f"resuming runs/mine after step {step}" in err
    losses = [json.loads(line) for line in open(folder / "runs/mine/metrics.jsonl")]
    held_out = [line["eval/loss"] for line in losses if "eval/loss" in line]
    assert [line["step"] for line in losses if "eval/loss" in line] == [10, 20, 30]
    assert held_out[2] < held_out[0]
    # Tuned from it, evaluated, taken as a teacher by a student that was exported.
    assert (
        "starting from runs/mine, step 30: 40 parameters loaded, 0 dropped, 0 initialized randomly"
        in err
    )
    report = json.loads((folder / "runs/tuned/dev/report.json").read_text())
    assert report["tasks"]["dev"]["examples"] == 40
    assert set(report["tasks"]["dev"]["scores"]) >= {"exact_match", "perplexity"}
    assert read_card(folder / "data/train").examples == 80
    assert "320 tokens in 10 rows" in out
    last = json.loads((folder / "runs/student/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20 and last["train/distill_loss"] > 0
    student = load_params_for_inference(folder / "runs/student")[1]
    exported = open_directory(folder / "runs/student-hf")
    assert sum(a.size for a in exported.values()) == size(student)
    # Served: one answer, and an orderly end.
    [answer] = [json.loads(line) for line in out.splitlines() if line.startswith('{"id"')]
    assert (
        isinstance(answer["choices"][0]["text"], str) and answer["usage"]["completion_tokens"] > 0
    )
    assert err.endswith("ended\n")


def size(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_module_of_ones_own_goes_from_listing_to_evaluation(walked):
    folder, out, _ = walked
    assert read_card(folder / "data/questions").examples == 1
    assert "faq: questions of our users" in out and "Question: What is 0?\nAnswer:" in out
    assert "faq_and_sums: mixture of faq, sums" in out
    card = read_card(folder / "data/faq")
    assert (card.task, card.examples, card.split) == ("faq", 12, "train")
    tasks = json.loads((folder / "runs/faq/evaluation/report.json").read_text())["tasks"]
    assert {name: task["examples"] for name, task in tasks.items()} == {"faq": 3, "sums": 10}
    assert "first_word" in tasks["faq"]["scores"] and "exact_match" in tasks["sums"]["scores"]


def test_the_python_calls_do_what_they_print(walked):
    folder, out, _ = walked
    assert "36 examples in 12 rows" in out and "30 steps; checkpoint in run\n" in out
    lines = [json.loads(line) for line in open(folder / "run/metrics.jsonl")]
    losses = [line["train/loss"] for line in lines]
    assert [line["step"] for line in lines] == [10, 20, 30] and losses[-1] < losses[0]
    report = json.loads((folder / "scores/report.json").read_text())
    assert f"\n{report['tasks']['pairs']['scores']}\n" in out
    # Through transformers' format and back: the same model, so the same answer.
    answers = re.findall(r"^\['.*'\]$", out, re.MULTILINE)
    assert len(answers) == 2 and answers[0] == answers[1]
