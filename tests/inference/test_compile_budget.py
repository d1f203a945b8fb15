"""Programs for drafts are compiled only where that pays."""

from __future__ import annotations

import numpy as np
import pytest

from encdec.inference.compile_budget import SHARE, CompileBudget
from encdec.inference.pace import LONGEST_DRAFT, PLAIN, SIZES, Pace

COMPILING, STEP, SHAPES, LENGTH = 2.0, 0.001, 5, 50


def answered(batches, eager, right, cost, told=True):
    """Seconds for batches of five shapes in turn: in all, of plain steps alone, and for compiling
    drafts' programs, of which it also gives the number."""
    budget, pace = CompileBudget(first_free=eager), Pace(1, eager)
    taken = plain = compiling = 0.0
    compiled = set()
    for number in range(batches):
        shape = number % SHAPES
        budget.left = batches - number - 1 if told else 0
        programs, done = budget.programs(shape), 1
        while done < LENGTH:
            size = pace.size(programs.sizes(pace))
            tokens = 1 if size == PLAIN else 1 + (size - 1) * right
            steps = min(4 if pace.trial else 30, int(np.ceil((LENGTH - done) / tokens)))
            seconds = steps * STEP * (1 if size == PLAIN else cost[size])
            if (shape, size) not in compiled:
                compiled.add((shape, size))
                seconds += COMPILING
                compiling += COMPILING * (size != PLAIN)
            done += int(steps * tokens)
            taken += seconds
            if programs.note(size, seconds, pace.saved(size, seconds)):
                pace.note_compiling(size)
            else:
                pace.note_seconds(size, seconds / steps)
            if size == PLAIN:
                pace.note_hindsight(np.r_[1.0, np.full(LONGEST_DRAFT, right)])
            else:
                pace.note_made(100 * np.r_[1.0, np.full(size - 1, right)])
        plain += (LENGTH - 1) * STEP
    plain += min(SHAPES, batches) * COMPILING
    return taken, plain, compiling, sum(size != PLAIN for _, size in compiled)


CHEAP = {size: 1 + 0.1 * (size - 1) for size in SIZES}
EXPENSIVE = {size: float(size) for size in SIZES}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("cost", [CHEAP, EXPENSIVE])
@pytest.mark.parametrize("batches", [1, 12, 100, 2_000])
def test_drafts_that_are_not_asked_for_never_make_a_file_slower(batches, cost, told):
    """However many answers, right drafts or not, and whether it is known how many follow."""
    for right in (0.9, 0.1):
        taken, plain, compiling, _ = answered(batches, False, right, cost, told)
        assert taken < 1.03 * plain
        assert compiling <= SHARE * taken + max(plain - taken + compiling, 0) + 0.05 * plain


def test_programs_are_compiled_where_many_answers_follow():
    taken, plain, _, programs = answered(5_000, False, 0.9, CHEAP)
    assert taken < 0.6 * plain and programs >= SHAPES
    assert answered(100, False, 0.9, CHEAP)[3] == 0  # five seconds in all: less than compiling


def test_drafts_that_are_asked_for_compile_one_program_at_first():
    assert answered(12, True, 0.9, CHEAP)[3] == 1
    taken, plain, _, _ = answered(2_000, True, 0.9, CHEAP)
    assert taken < 0.6 * plain


def test_a_batch_ends_with_its_slowest_row():
    """Rows whose drafts are right all the time say nothing of one where they never are."""
    pace = Pace(4, True)
    pace.note_compiled()
    for size, seconds in ((PLAIN, 1.0), (SIZES[0], 1.5), (PLAIN, 1.0)):
        pace.note_seconds(size, seconds)
    pace.note_made(np.array([100, 75]))
    assert pace.tokens(2) == 1.75 and pace.rate(2) > 1.1
    for _ in range(6):
        pace.note_batch(1.75, 1.0)
    assert pace.tokens(2) < 1.02 and {pace.size() for _ in range(4)} == {PLAIN}
