"""What distillation costs, from configurations and cards alone: bytes, teacher FLOPs, overhead."""

from __future__ import annotations

import dataclasses

from encdec.cost.chips import chip_named
from encdec.cost.flops import training_flops
from encdec.data.records import DatasetCard
from encdec.data.sparse_logits import SparseFormat
from encdec.model import ModelConfig

# Bytes per token, without its pairs: size and two float16, one more for top_k; see sparse_logits.
_SCALAR_BYTES = {"sampled": 5, "top_k": 7, "full": 4}
EXAMPLE_CHIPS = ("TPU v5e", "TPU v5p", "H100 SXM")
# What deflated rows of 50 draws took of SmolLM2-135M at 49,152 ids, a token and an id more; and the
# ids that arXiv 2503.16870 counts a token with a 3B teacher. docs/distillation.md has both.
_DEFLATED = (4.5, 1.66)
TYPICAL_IDS = 12.0
# Operations that the teacher adds to a student's step, a logit and a stored pair, forward and
# backward, as XLA counts the lowered program; and a pair's id, weight and position in a batch.
_LOGIT_FLOPS, _PAIR_FLOPS, _PAIR_BATCH_BYTES = 8, 33, 12
UTILISATION = 0.4  # of a chip's peak that the teacher is assumed to reach, a forward pass alone


@dataclasses.dataclass(frozen=True)
class TeacherCost:
    """Of one pass of the teacher, and of what it leaves on disk.

    Attributes:
        rows, tokens: of the records; tokens are loss-bearing targets.
        typical_bytes_per_token: of draws of a sure teacher, as stored; 0 for other formats.
        most_bytes_per_token: before compression and where no id is drawn twice.
        most_bytes: of the whole.
        dense_bytes: of every logit in two bytes, for comparison.
        teacher_flops: of reading all rows once.
    """

    rows: int
    tokens: int
    typical_bytes_per_token: float
    most_bytes_per_token: float
    most_bytes: float
    dense_bytes: float
    teacher_flops: float


def teacher_cost(teacher_flops: float, card: DatasetCard, fmt: SparseFormat) -> TeacherCost:
    """The cost of a teacher's logits on these records; the FLOPs of its pass are given."""
    pairs = fmt.pair_bytes * fmt.pairs_limit if fmt.method != "full" else 4 * fmt.vocab_size
    per_token = pairs + _SCALAR_BYTES[fmt.method]
    tokens = card.target_tokens
    drawn = fmt.method == "sampled" and not fmt.weighted
    typical = _DEFLATED[0] + _DEFLATED[1] * TYPICAL_IDS if drawn else 0.0
    return TeacherCost(
        card.rows,
        tokens,
        typical,
        per_token,
        float(per_token * tokens),
        2.0 * fmt.vocab_size * tokens,
        teacher_flops,
    )


@dataclasses.dataclass(frozen=True)
class StudentCost:
    """What a teacher's draws add to a student's training.

    Attributes:
        flops: of one pass over the records without a teacher, by formula.
        extra_flops: on top: every pair's part of the loss and of the logits' gradient.
        extra_bytes_per_row: that the host sends to the devices.
    """

    flops: float
    extra_flops: float
    extra_bytes_per_row: float


def student_cost(
    student: ModelConfig, card: DatasetCard, ids_per_token: float = TYPICAL_IDS
) -> StudentCost:
    """The cost of a student of the records' rows, with and without the teacher."""
    rows, targets = card.rows, card.targets_length
    pairs = ids_per_token * targets
    extra = _PAIR_FLOPS * pairs + _LOGIT_FLOPS * targets * student.vocab_size
    return StudentCost(
        training_flops(student, card.inputs_length, targets, batch_size=rows),
        rows * extra,
        _PAIR_BATCH_BYTES * pairs + 4 * targets,
    )


def describe_student(name: str, cost: StudentCost) -> str:
    """One line for a person."""
    return (
        f"a student {name}: {cost.flops:.3g} FLOPs a pass; the teacher's draws add "
        f"{cost.extra_flops / cost.flops:.4%} to them, and {_size(cost.extra_bytes_per_row)} per "
        "row to what the host sends"
    )


def describe_cost(cost: TeacherCost) -> str:
    """A few lines for a person, with hours on some chips at an assumed utilisation."""
    lines = [f"{cost.rows:,} rows, {cost.tokens:,} target tokens"]
    if cost.typical_bytes_per_token:
        lines.append(
            f"about {cost.typical_bytes_per_token:.0f} bytes per token, "
            f"{_size(cost.typical_bytes_per_token * cost.tokens)} in all, with "
            f"{TYPICAL_IDS:.0f} different ids per token"
        )
    lines += [
        f"at most {cost.most_bytes_per_token:.0f} bytes per token, {_size(cost.most_bytes)} in all "
        f"(every logit in bfloat16: {_size(cost.dense_bytes)})",
        f"{cost.teacher_flops:.3g} FLOPs of the teacher, once",
    ]
    for chip in map(chip_named, EXAMPLE_CHIPS):
        hours = cost.teacher_flops / (chip.bf16_flops * UTILISATION) / 3600
        lines.append(f"  {hours:,.3f} hours on one {chip.name}, at {UTILISATION:.0%} of its peak")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
