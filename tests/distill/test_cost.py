"""The calculator against sums done by hand."""

from __future__ import annotations

import pytest

from encdec.cost.flops import training_flops
from encdec.data.records import open_records
from encdec.data.sparse_logits import SparseFormat
from encdec.distill.cost import describe_cost, describe_student, student_cost, teacher_cost
from encdec.model import preset


def test_bytes_and_flops_of_a_teacher(records):
    card = open_records(records).card
    cost = teacher_cost(1e18, card, SparseFormat("sampled", 32_000))
    assert (cost.rows, cost.tokens) == (card.rows, card.target_tokens)
    assert cost.most_bytes_per_token == 5 + 3 * 50
    assert cost.typical_bytes_per_token < 36  # the goal, at 12 ids per token
    assert cost.dense_bytes == 2 * 32_000 * card.target_tokens
    said = describe_cost(cost)
    assert "at most 155 bytes per token" in said and "about 24 bytes per token" in said
    # 10^18 FLOPs at 40 % of 197 TFLOP/s.
    assert "3.525 hours on one TPU v5e" in said
    top = teacher_cost(1.0, card, SparseFormat("top_k", 100_000, k=12))
    assert top.most_bytes_per_token == 7 + 5 * 12 and not top.typical_bytes_per_token
    assert "about" not in describe_cost(top)
    assert teacher_cost(1.0, card, SparseFormat("full", 512)).most_bytes_per_token == 4 + 2048


def test_a_teacher_costs_its_student_next_to_nothing(records):
    card = open_records(records).card
    student = preset("330m")
    cost = student_cost(student, card, ids_per_token=10)
    assert cost.flops == training_flops(student, 24, 12, batch_size=card.rows)
    assert cost.extra_flops == card.rows * (33 * 120 + 8 * 12 * student.vocab_size)
    assert cost.extra_bytes_per_row == 12 * 120 + 48
    assert cost.extra_flops < 0.001 * cost.flops
    assert "a student 330m" in describe_student("330m", cost)


def test_the_calculator_stores_nothing(records, teacher, capsys):
    from encdec.cli import main

    words = ["distill", "logits", f"--teacher={teacher}", f"--records={records}"]
    assert main([*words, "--dry_run", "--student=330m"]) == 0
    said = capsys.readouterr().out
    assert "FLOPs of the teacher, once" in said and "a student 330m" in said
    assert main(words) == 2
    assert "--out is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["distill", "logits", "--help"])
