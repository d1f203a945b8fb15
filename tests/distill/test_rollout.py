"""Records that a model wrote: its own answers to the same sources, whatever interrupts it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from encdec.cli import main
from encdec.data.records import decode_row, open_records
from encdec.data.verify import verify_records
from encdec.data.vocabulary import ByteVocabulary
from encdec.distill import distill_command
from encdec.distill.rollout import ON_POLICY, Answering, rollout
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.errors import CheckpointError, ConfigError, DataError
from encdec.inference.generation_settings import GenerationSettings
from encdec.inference.load_generator import load
from encdec.train.job import prepare_job
from encdec.train.loop import train
from tests.devices import one_device
from tests.train.conftest import TARGETS, random_pairs, small_run, write_records

GREEDY = GenerationSettings()


@pytest.fixture(scope="module")
@one_device()
def student(records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("student") / "work"
    train(
        small_run(
            records, model="test", steps=12, model_overrides={"scan_layers": False, "init_std": 0.1}
        ),
        workdir,
    )
    return workdir


def pairs_of(directory):
    """Every (source, target) of a records directory as tuples of ids, sorted."""
    opened = open_records(directory)
    rows = [
        decode_row(data, opened.card.token_dtype) for data in opened.read(np.arange(len(opened)))
    ]
    return sorted(
        (tuple(s.tolist()), tuple(t.tolist()))
        for sources, targets in rows
        for s, t in zip(sources, targets)
    )


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_targets_are_the_writers_answers_to_the_same_sources(records, student, tmp_path):
    card = rollout(student, records, tmp_path / "out", answering=Answering(GREEDY, block_rows=16))
    before, after = pairs_of(records), pairs_of(tmp_path / "out")
    assert sorted(source for source, _ in before) == [source for source, _ in after]
    vocabulary = open_records(records).vocabulary()
    texts = [vocabulary.decode(source[:-1]) for source, _ in after]
    answers = load(student, batch_rows=64).generate(texts, GREEDY)
    for (_, target), (answer,) in zip(after, answers):
        assert list(target) == answer.tokens and 0 < len(target) <= TARGETS
    assert card.target_tokens == sum(len(target) for _, target in after)
    unfinished = sum(target[-1] != vocabulary.eos_id for _, target in after)
    assert card.truncated == ({"answers_without_eos": unfinished} if unfinished else {})
    assert not verify_records(tmp_path / "out").faults


def test_beams_take_the_place_of_drawing():
    """Whose defaults do not stand in their way; what is given with them is refused."""
    parse = lambda *flags: distill_command._answering(
        distill_command._parser().parse_args(
            ["rollout", "--checkpoint=a", "--records=b", "--out=c", *flags]
        )
    )
    assert parse().settings == ON_POLICY
    assert parse("--temperature=0").settings == GenerationSettings(temperature=0)
    assert parse("--beams=5").settings == GenerationSettings(beams=5)
    for flags in (["--beams=5"], ["--temperature=0"]):
        with pytest.raises(ConfigError, match="seed is 3"):
            parse(*flags, "--seed=3")
    with pytest.raises(ConfigError, match="temperature is 0.9, which beam search"):
        parse("--beams=5", "--temperature=0.9")


def test_a_round_gold_and_written_by_student_and_teacher(records, student, teacher, tmp_path):
    """Answers of both, read by the teacher, in one mixture with gold targets."""
    for name, writer in (("on-policy", student), ("sequence", teacher)):
        assert (
            main(
                [
                    "distill",
                    "rollout",
                    f"--checkpoint={writer}",
                    f"--records={records}",
                    f"--out={tmp_path / name}",
                    "--rows=20",
                    "--temperature=0",
                    "--top_k=0",
                ]
            )
            == 0
        )
    parts = [records, tmp_path / "on-policy", tmp_path / "sequence"]
    columns = []
    for number, part in enumerate(parts):
        columns.append(tmp_path / f"stored-{number}")
        store_teacher_logits(teacher=teacher, records=part, out=columns[-1], draws=10)
    job = prepare_job(
        small_run(
            f"{parts[0]}=2,{parts[1]}=1,{parts[2]}=1",
            distill={"teacher": ",".join(map(str, columns))},
        ),
        tmp_path / "work",
    )
    assert job.records.shares == (0.5, 0.25, 0.25)
    assert len(job.teacher.parts) == 3


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"answering": Answering(GenerationSettings(temperature=1.0, samples=2))},
            ConfigError,
            "samples is 2",
        ),
        ({"writer": "/nowhere"}, CheckpointError, "/nowhere"),
        ({"answering": Answering(draft="/no/draft")}, CheckpointError, "/no/draft has no config"),
        ({"answering": Answering(block_rows=0)}, ConfigError, "block_rows is 0"),
        ({"answering": Answering(batch_rows=0)}, ConfigError, "batch_rows is 0"),
        ({"answering": Answering(rows=-1)}, ConfigError, "rows is -1"),
    ],
)
def test_what_cannot_work_is_refused(changes, error, message, records, student, tmp_path):
    with pytest.raises(error, match=message):
        rollout(**({"writer": student, "records": records, "out": tmp_path / "out"} | changes))
    assert not (tmp_path / "out").exists()


def test_the_records_that_are_read_are_not_replaced(student, records):
    with pytest.raises(ConfigError, match="is --records, whose sources are read"):
        rollout(student, records, f"{records}/../{records.name}", overwrite=True)


def test_records_that_were_prepared_are_no_rollout(student, records, tmp_path):
    shutil.copytree(records, tmp_path / "other")
    with pytest.raises(DataError, match="other holds no rollout; give another --out"):
        rollout(student, records, tmp_path / "other")


def test_another_vocabulary_is_refused(student, tmp_path):
    words = write_records(tmp_path / "words", random_pairs(3, 0), ByteVocabulary(extra_ids=2))
    with pytest.raises(DataError, match="model's vocabulary"):
        rollout(student, words, tmp_path / "out")
