"""Mixtures: rates, addressing by step, hosts, named errors; of records and of tasks."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encdec.data import mixing
from encdec.data.batches import Batches
from encdec.data.mixing import (
    BLOCK,
    MixedRecords,
    block_quotas,
    mix_records,
    mixing_rates,
    parse_mixture,
)
from encdec.data.prepare import prepare
from encdec.data.readers import BadRows
from encdec.data.records import decode_row, open_records
from encdec.data.task_mixtures import mixed_task, task_or_mixture
from encdec.data.text_tasks import jsonl_task, text_files_task
from encdec.errors import ConfigError, DataError
from tests.data.conftest import random_pairs, write_jsonl


@pytest.fixture
def three(make_records):
    """Parts of 7, 40 and 160 rows; the first token of each row tells its part."""
    parts = []
    for name, count in (("a", 7), ("b", 40), ("c", 160)):
        sources, targets = random_pairs(np.random.default_rng(count), count, 9, 5)
        for source in sources:
            source[0] = count
        parts.append(
            make_records(
                sources, targets, inputs_length=16, targets_length=8, packing="none", name=name
            )
        )
    return parts


def test_rates_proportional_by_temperature_and_explicit():
    np.testing.assert_allclose(mixing_rates([100, 300]), [0.25, 0.75])
    np.testing.assert_allclose(mixing_rates([100, 900], temperature=2), [0.25, 0.75])
    np.testing.assert_allclose(mixing_rates([100, 900], maximum=300), [0.25, 0.75])
    np.testing.assert_allclose(mixing_rates([1, 1], [1, 4]), [0.2, 0.8])
    for wrong in ([1], [1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(ConfigError, match=r"expected 2 numbers above 0"):
            mixing_rates([1, 1], wrong)
    for temperature in (0, float("nan")):
        with pytest.raises(ConfigError, match=rf"temperature is {temperature}"):
            mixing_rates([1, 1], temperature=temperature)
    with pytest.raises(ConfigError, match=r"temperature of 0.001 is too small for parts of 10,000"):
        mixing_rates([10_000, 20_000], temperature=0.001)

    with pytest.raises(ConfigError, match=r"has rates and also temperature 2.0"):
        mixing_rates([1, 1], [1, 4], temperature=2.0)
    with pytest.raises(ConfigError, match=r"has rates and also .* maximum 5"):
        mixing_rates([1, 1], [1, 4], maximum=5)
    with pytest.raises(ConfigError, match=r"maximum is 0"):
        mixing_rates([1, 1], maximum=0)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=9))
def test_quotas_fill_a_block_and_keep_every_share(weights):
    shares = np.asarray(weights) / sum(weights)
    quotas = block_quotas(shares)
    block = int(quotas.sum())
    assert block in {BLOCK * 10**power for power in range(7)}
    assert np.abs(quotas / block / shares - 1).max() <= mixing.PRECISION
    assert np.abs(quotas - shares * block).max() <= 1


def test_small_rates_are_read_or_refused(monkeypatch):
    records = _rows_only(monkeypatch, (1500, 40), [1, 2e-5])
    assert records.read_shares[1] == pytest.approx(2e-5, rel=0.01)
    batches = Batches(records, global_batch=50_000, seed=1)
    _, parts = _parts(records, batches, 20)
    # 20 are expected of a million; drawn without regard to the block they would be 20 +- 4.5.
    assert 4 <= (parts == 1).sum() <= 40
    later = Batches(records, global_batch=24, seed=1)
    # Position 50,000,000,000 is place 8 of its batch of 24.
    found = later.row_numbers(10**6 * 50_000 // 24)[8:]
    np.testing.assert_array_equal(found, batches.row_numbers(10**6)[:16])
    with pytest.raises(
        ConfigError, match=r"share of 1e-09 of the rows; the smallest possible is 1e-08"
    ):
        _rows_only(monkeypatch, (1500, 40), [1, 1e-9])


def test_small_rates_keep_every_place_of_a_block(monkeypatch):
    monkeypatch.setattr(mixing, "BLOCK", 10)
    records = _rows_only(monkeypatch, (1500, 40), [499, 1])
    block = sum(records._quotas)
    assert block == 1000 and records.read_shares[1] == 0.002
    _, parts = _parts(records, Batches(records, global_batch=block, seed=1), 3)
    assert parts.reshape(3, block).sum(1).tolist() == [2, 2, 2]


def _parts(records, batches, steps):
    numbers = np.concatenate([batches.row_numbers(step) for step in range(steps)])
    offsets = np.cumsum([len(part) for part in records.parts])
    return numbers, np.searchsorted(offsets, numbers, side="right")


class _Part:
    """Stands for records where only the number of rows matters."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows


def _rows_only(monkeypatch, sizes, rates):
    monkeypatch.setattr(mixing, "MUST_AGREE", {})
    monkeypatch.setattr(mixing, "_mixed_card", lambda *given: None)
    monkeypatch.setattr(_Part, "directory", ".", raising=False)
    return MixedRecords([_Part(size) for size in sizes], mixing_rates(sizes, rates))


def test_every_block_has_the_rates_and_every_part_its_epochs(monkeypatch):
    records = _rows_only(monkeypatch, (1500, 4000, 6000), [5, 3, 2])
    batches = Batches(records, global_batch=500, seed=3)
    numbers, parts = _parts(records, batches, 2 * BLOCK // 500)
    for block in (parts[:BLOCK], parts[BLOCK:]):
        assert np.bincount(block).tolist() == [5000, 3000, 2000]
    # Short stretches are mixed too.
    assert abs(np.mean(parts[:1000] == 0) - 0.5) < 0.06
    # Each part comes evenly: rows differ by one visit at most over a block's quota.
    for part, rows in enumerate((1500, 4000, 6000)):
        visits = collections.Counter(numbers[:BLOCK][parts[:BLOCK] == part].tolist())
        assert len(visits) == min(rows, [5000, 3000, 2000][part])
        assert max(visits.values()) - min(visits.values()) <= 1
    other = Batches(records, global_batch=500, seed=4)
    assert (other.row_numbers(0) != batches.row_numbers(0)).any()


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 8])
def test_hosts_and_any_step_give_the_same_mixture(monkeypatch, hosts):
    records = _rows_only(monkeypatch, (3000, 9000), [1, 1])
    for step, seed in ((0, 0), (7, 1), (416, 2), (10**7, 3)):
        options = dict(global_batch=24, seed=seed)
        whole = Batches(records, **options).row_numbers(step)
        hosted = [
            Batches(records, **options, host_index=host, host_count=hosts).row_numbers(step)
            for host in range(hosts)
        ]
        np.testing.assert_array_equal(np.concatenate(hosted), whole)


def test_a_mixture_opens_by_name_and_reads_as_one_directory(three):
    a, b, c = (str(part.directory) for part in three)
    records = open_records(f"{a}=1,{c}=3")
    assert records.shares == (0.25, 0.75) and len(records) == 167
    assert records.card.rows == 167 and records.card.task == "made+made"
    assert records.card.fingerprint != open_records(f"{a}=1,{c}=2").card.fingerprint
    assert records.vocabulary().fingerprint == three[0].vocabulary().fingerprint
    batches = Batches(records, global_batch=32, seed=1)
    found = collections.Counter(
        token
        for step in range(12)
        for token in batches[step]["encoder_input_tokens"][:, 0].tolist()
    )
    assert set(found) == {7, 160} and 0.18 < found[7] / sum(found.values()) < 0.32
    for step, batch in zip((4, 5), batches.iterate(4, 6)):
        for name, values in batches[step].items():
            np.testing.assert_array_equal(batch[name], values)
    # Evaluation sees every row once.
    whole = Batches(open_records(f"{a},{b},{c}"), global_batch=32, shuffle=False, repeat=False)
    numbers = np.concatenate([whole.row_numbers(step) for step in range(len(whole))])
    assert numbers[numbers >= 0].tolist() == list(range(207))
    np.testing.assert_allclose(
        open_records(f"{a},{c};temperature=2").shares, mixing_rates([7, 160], temperature=2)
    )
    assert isinstance(mix_records([a, b]), MixedRecords)


def test_wrong_mixtures_are_refused(three, make_records):
    a = str(three[0].directory)
    sources, targets = random_pairs(np.random.default_rng(0), 5, 9, 5)
    other = make_records(sources, targets, inputs_length=24, targets_length=8, name="wide")
    with pytest.raises(ConfigError, match=r"inputs_length is 16 in .* but 24 in .*wide"):
        open_records(f"{a}=1,{other.directory}=1")
    with pytest.raises(DataError, match=r"as a mixture .* part nowhere does not exist"):
        open_records(f"{a}=1,nowhere=1")
    # A path that is missing is a path, whatever its name holds.
    with pytest.raises(DataError, match=r"directory /nowhere/lr=3 does not exist"):
        open_records("/nowhere/lr=3")
    with pytest.raises(ConfigError, match=r"share of 1e-09"):
        open_records(f"{a}=1,{three[1].directory}=1e-9")
    rated = open_records(f"{a}=1,{three[1].directory}=2")
    with pytest.raises(
        ConfigError, match=r"rates of a mixture have no effect when every row is read once"
    ):
        Batches(rated, global_batch=8, repeat=False)
    with pytest.raises(ConfigError, match=r"mixture.rates, .* the task is xsum"):
        task_or_mixture("xsum", rates=[1])
    for text, message in (
        ("a=1,b", "every part a rate"),
        ("a=x,b=1", "'x' is not a number"),
        ("a=1,,b=1", "empty part"),
        ("a,b;heat=2", "temperature=NUMBER"),
        ("a=1,b=2;temperature=2", "every part a rate"),
        ("a=1,b=2,a/=3", "has 'a' twice"),
        ("a,b;temperature=1.2.3", "the temperature '1.2.3' is not a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_mixture(text)
    assert parse_mixture("a=1,b=2.5e-6") == (["a", "b"], [1.0, 2.5e-6], 1.0)


def test_paths_in_mixtures_are_the_users(three, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    named = tmp_path / "lr=3"
    three[0].directory.rename(named)
    other = f"~/{three[1].directory.name}"
    assert len(open_records("~/lr=3")) == 7
    assert open_records(f"{named},{other}").shares == (7 / 47, 40 / 47)
    assert open_records(f"~/lr=3=1,{other}=3").shares == (0.25, 0.75)
    with pytest.raises(ConfigError, match=r"is empty"):
        open_records("")


def _task(tmp_path, name, count):
    rows = [{"source": f"{name}{i}", "target": "t"} for i in range(count)]
    task = jsonl_task([str(write_jsonl(tmp_path / f"{name}.jsonl", rows))])
    return type(task)(name, task.read, task.objective, task.origin, ("train",))


def test_tasks_mix_by_rate_until_all_are_read(tmp_path):
    tasks = [_task(tmp_path, "a", 10), _task(tmp_path, "b", 30)]
    proportional = [s for s, _ in mixed_task("m", tasks).documents("train", BadRows())]
    names = [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(30)]
    assert sorted(proportional) == sorted(names)
    assert [name[0] for name in proportional[:8]].count("a") == 2
    equal = [s for s, _ in mixed_task("m", tasks, [1, 1]).documents("train", BadRows())]
    found = collections.Counter(name[0] for name in equal)
    assert found["b"] == 30 and abs(found["a"] - 30) <= 1
    assert collections.Counter(equal)["a0"] == 3
    card = prepare(out=tmp_path / "out", vocabulary="bytes", task=mixed_task("m", tasks, [1, 1]))
    assert card.documents == len(equal) and card.task == "m"
    assert card.origin["rates"] == [1, 1]
    text = tmp_path / "a.txt"
    text.write_text("words")
    with pytest.raises(ConfigError, match=r"a has source and target, text has text"):
        mixed_task("m", [tasks[0], text_files_task([str(text)])])


def test_mixed_rows_decode(three):
    records = mix_records([part.directory for part in three])
    stored = records.read([0, 206, 7, 3])
    firsts = [int(decode_row(row, records.card.token_dtype)[0][0][0]) for row in stored]
    assert firsts == [7, 160, 40, 7]
