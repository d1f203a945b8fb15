"""Held-out mixtures: rates are obeyed and every part is reported."""

from __future__ import annotations

import pytest

from encdec.data.records import open_records
from encdec.train.evaluator import Evaluator
from encdec.train.job import prepare_job
from encdec.train.run_config import parse_config
from tests.devices import one_device
from tests.train.conftest import small_run, write_records


@pytest.fixture(scope="module")
@one_device()
def reports(records, eval_records, tmp_path_factory):
    """Reports of one model's first parameters on the parts alone and on mixtures of them."""
    folder = tmp_path_factory.mktemp("evaluate")
    other = write_records(folder / "other" / "eval", [[("zzzz", "yyxx")]] * 7)
    job = prepare_job(small_run(records), folder / "run")
    params = job.program.init().params
    directories = {"letters": str(eval_records), "other": str(other)}

    def report(spec, **changes):
        held_out = spec.format(**directories)
        run = parse_config(small_run(records, data={"eval_records": held_out}, **changes))
        opened = open_records(held_out)
        return Evaluator(job.program, run, job.model, opened)(params)

    return report


def test_rates_are_obeyed_and_parts_reported(reports):
    letters, other = reports("{letters}"), reports("{other}")
    assert letters["eval/loss"] != pytest.approx(other["eval/loss"], rel=1e-3)
    tokens = [letters["eval/target_tokens"] / 19, other["eval/target_tokens"] / 7]
    for rates in ((1, 1), (1000, 1), (1, 1000), (1, 1e-6)):
        mixed = reports(f"{{letters}}={rates[0]},{{other}}={rates[1]}")
        # Rows are drawn at the rates, and the loss is a mean over their tokens.
        weights = [rate * count for rate, count in zip(rates, tokens)]
        wanted = sum(w * r["eval/loss"] for w, r in zip(weights, (letters, other))) / sum(weights)
        assert mixed["eval/loss"] == pytest.approx(wanted, rel=1e-5)
        (first,) = {name.split("/")[1] for name in mixed if name.count("/") == 3} - {"other"}
        for part, alone in ((f"{first}/eval", letters), ("other/eval", other)):
            for name, value in alone.items():
                assert mixed[name.replace("eval/", f"eval/{part}/")] == value
    assert mixed["eval/target_tokens"] == sum(r["eval/target_tokens"] for r in (letters, other))


def test_without_rates_all_rows_count_alike(reports):
    letters, other = reports("{letters}"), reports("{other}")
    mixed = reports("{letters},{other}")
    counts = [r["eval/target_tokens"] for r in (letters, other)]
    for name in ("eval/loss", "eval/accuracy"):
        wanted = sum(n * r[name] for n, r in zip(counts, (letters, other))) / sum(counts)
        assert mixed[name] == pytest.approx(wanted, rel=1e-5)
    per_byte = sum(n * r["eval/loss"] for n, r in zip(counts, (letters, other)))
    text_bytes = sum(
        r["eval/loss"] * n / r["eval/loss_per_byte"] for n, r in zip(counts, (letters, other))
    )
    assert mixed["eval/loss_per_byte"] == pytest.approx(per_byte / text_bytes, rel=1e-5)


def test_a_sample_takes_rows_of_every_part(reports):
    mixed = reports("{letters}=1000,{other}=1", eval={"every": 5, "batches": 2, "batch_size": 8})
    tokens = {name: mixed[name] for name in mixed if name.endswith("/eval/target_tokens")}
    whole = reports("{letters}=1000,{other}=1")
    # Sixteen of the letters' nineteen rows, and the one batch that holds all seven others.
    assert [tokens[name] < whole[name] for name in tokens] == [True, False]
