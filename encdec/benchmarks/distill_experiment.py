"""Does a teacher's column help? One teacher, students of one size, several kinds of column.

A decoder-only teacher is trained on a corpus, its logits on the students' records are stored in
each format, and the students learn at equal steps from gold targets alone, from every logit, from
draws, and from top-k rows. Every run has a directory of its own, and what is finished is not run
again.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from encdec.cost.flops import count_parameters
from encdec.data.batches import Batches, RowFields
from encdec.data.records import open_records
from encdec.data.teacher_rows import TeacherCard, open_teacher, read_teacher_card
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.errors import ConfigError
from encdec.files import write_json
from encdec.jobs import claim_settings
from encdec.logs import Say
from encdec.model import build_model, preset
from encdec.saved.saved_params import load_params_for_inference
from encdec.train.loop import train
from encdec.train.losses import loss_positions
from encdec.train.program import build_program
from encdec.train.run_config import RunConfig, parse_config
from encdec.train.run_fields import Tail
from encdec.train.sharding import make_mesh

TEACHER_RATIO = 4.0  # the least size of the teacher, in students
BINS = 15  # of the calibration error, as in arXiv 1706.04599


@dataclasses.dataclass(frozen=True)
class DistillExperiment:
    """The settings; every field but ``work`` and ``seeds`` is part of the runs' identity.

    Attributes:
        work: receives everything.
        records, eval_records: of the students.
        teacher_records: of the teacher; may hold more text.
        student, teacher: presets.
        teacher_layers: in place of the preset's; 0 leaves it.
        steps, teacher_steps: optimizer steps.
        batch_size: rows per step.
        seeds: runs of each kind.
        alpha: weight of the teacher.
        learning_rate: of Muon, for all.
    """

    work: pathlib.Path
    records: str
    eval_records: str
    teacher_records: str
    student: str = "micro-300k"
    teacher: str = "micro-1m-dec"
    teacher_layers: int = 8
    steps: int = 400
    teacher_steps: int = 1200
    batch_size: int = 16
    seeds: int = 3
    alpha: float = 0.9
    learning_rate: float = 1e-2


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of student: how the teacher's rows are stored, and what the loss does with them.

    ``method`` is "" for gold targets alone.
    """

    name: str
    method: str = ""
    draws: int = 50
    k: int = 12
    tail: Tail = "merged"

    @property
    def store(self) -> str:
        """The teacher directory's name; variants that read the same rows share it."""
        size = {"sampled": self.draws, "top_k": self.k}.get(self.method, "")
        return f"{self.method}{size}"


CE, FULL = Variant("CE"), Variant("full KD", "full")
SAMPLED = Variant("50 draws", "sampled")


def variants(pairs_per_token: float) -> list[Variant]:
    """The students, the most important first; top-k with as many bytes as the draws.

    A drawn id takes 3 bytes and a token 5 more, a kept id 4 and a token 7 more.
    """
    k = max(1, round((3 * pairs_per_token + 5 - 7) / 4))
    equal = Variant(f"top-{k}, bytes of 50 draws", "top_k", k=k, tail="dropped")
    others = [Variant(f"top-{n}", "top_k", k=n, tail="dropped") for n in (12, 50) if n != k]
    return [
        CE,
        FULL,
        SAMPLED,
        equal,
        *others,
        dataclasses.replace(equal, name=f"top-{k}, tail merged", tail="merged"),
    ]


def check_setting(setting: DistillExperiment) -> None:
    """Raises ConfigError unless the teacher is decoder-only and large enough."""
    teacher, student = (
        count_parameters(run.model_config()).total
        for run in (_teacher_config(setting), student_config(setting, CE, 0))
    )
    if teacher < TEACHER_RATIO * student:
        raise ConfigError(
            f"the teacher {setting.teacher} has {teacher:,} parameters, the student "
            f"{student:,}; expected at least {TEACHER_RATIO:g} times as many: give a larger "
            "--teacher, such as micro-3m-dec, more --teacher_layers, or a smaller vocabulary"
        )
    if preset(setting.teacher).is_encoder_decoder:
        raise ConfigError(
            f"the teacher {setting.teacher} is an encoder-decoder; expected a "
            f"decoder-only preset, for example {setting.teacher}-dec"
        )


def run_experiment(setting: DistillExperiment, say: Say) -> dict[str, Any]:
    """Runs what is missing; returns all results, written to ``results.json`` after every run."""
    check_setting(setting)
    work = setting.work
    work.mkdir(parents=True, exist_ok=True)
    identity = {k: v for k, v in dataclasses.asdict(setting).items() if k not in ("work", "seeds")}
    path = work / "setting.json"
    claim_settings(
        path, identity, holder=work, remedy=f"give another --workdir, or those of {path}"
    )
    teacher = _teacher(setting, say)
    sampled = _stored(setting, SAMPLED, say)
    kinds = variants(sampled.pairs / sampled.tokens)
    for batch in (kinds[:4], kinds[4:]):
        for seed in range(setting.seeds):
            for variant in batch:
                _student(setting, variant, seed, say)
                write_json(work / "results.json", collect(setting, teacher, kinds))
    return collect(setting, teacher, kinds)


def collect(
    setting: DistillExperiment, teacher: Mapping[str, Any], kinds: Sequence[Variant]
) -> dict[str, Any]:
    """All finished runs by kind, with mean and sample standard deviation over the seeds."""
    rows = []
    for variant in kinds:
        runs = [
            result
            for seed in range(setting.seeds)
            if (result := _result(folder_of(setting, variant, seed))) is not None
        ]
        if not runs:
            continue
        row: dict[str, Any] = {"name": variant.name, "seeds": len(runs), "runs": runs}
        for name in ("loss", "accuracy", "ece"):
            values = np.array([run[name] for run in runs])
            row[name] = float(values.mean())
            row[f"{name}_std"] = float(values.std(ddof=1)) if len(values) > 1 else None
        if variant.method:
            card = read_teacher_card(setting.work / "scored" / variant.store)
            row |= {
                "bytes_per_token": card.bytes_per_token,
                "tail": card.tail,
                "ids_per_token": card.pairs / card.tokens,
            }
        rows.append(row)
    return {
        "setting": dataclasses.asdict(setting) | {"work": str(setting.work)},
        "teacher": dict(teacher),
        "students": rows,
        "device": jax.devices()[0].device_kind,
    }


def _config(
    setting: DistillExperiment, model: str, steps: int, records: str, seed: int, **changes: Any
) -> RunConfig:
    size = open_records(setting.records).card.vocabulary.size
    return parse_config(
        {
            "model": model,
            "model_overrides": {"vocab_size": size, "scan_layers": False} | changes,
            "batch_size": setting.batch_size,
            "steps": steps,
            "seed": seed,
            "log_every": max(1, steps // 8),
            "data": {"records": records, "eval_records": setting.eval_records},
            # docs/distillation.md has figures of this very recipe.
            "optimizer": {
                "name": "muon",
                "learning_rate": setting.learning_rate,
                "weight_decay": 0.1,
                "b2": 0.95,
            },
            "loss": {"z_loss": 0.0},
            "schedule": {"warmup_steps": max(1, steps // 10)},
            "checkpoint": {"every": 0},
            "eval": {"every": 0, "batch_size": 4 * setting.batch_size},
        }
    )


def _teacher_config(setting: DistillExperiment) -> RunConfig:
    changes = {"decoder_layers": setting.teacher_layers} if setting.teacher_layers else {}
    return _config(
        setting, setting.teacher, setting.teacher_steps, setting.teacher_records, 1000, **changes
    )


def student_config(setting: DistillExperiment, variant: Variant, seed: int) -> RunConfig:
    """The run of one student."""
    run = _config(setting, setting.student, setting.steps, setting.records, seed)
    if not variant.method:
        return run
    return dataclasses.replace(
        run,
        distill=dataclasses.replace(
            run.distill,
            teacher=str(setting.work / "scored" / variant.store),
            alpha=setting.alpha,
            tail=variant.tail,
        ),
    )


def folder_of(setting: DistillExperiment, variant: Variant, seed: int) -> pathlib.Path:
    """The work directory of one student."""
    return setting.work / "runs" / f"{variant.name.replace(' ', '-').replace(',', '')}-{seed}"


def _result(folder: pathlib.Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _trained(run: RunConfig, folder: pathlib.Path) -> dict[str, Any]:
    """Trains or resumes, and records the model's quality."""
    done = _result(folder)
    if done is not None:
        return done
    begin = time.monotonic()
    summary = train(run, folder)
    result = {
        "loss": summary.eval["eval/loss"],
        "accuracy": summary.eval["eval/accuracy"],
        "bits_per_byte": summary.eval["eval/bits_per_byte"],
        "ece": calibration_error(folder, run.data.eval_records),
        "train_loss": summary.train["train/loss"],
        "step_seconds": summary.train.get("train/step_seconds"),
        "seconds": time.monotonic() - begin,
    }
    write_json(folder / "result.json", result)
    return result


def _teacher(setting: DistillExperiment, say: Say) -> dict[str, Any]:
    run = _teacher_config(setting)
    say(f"teacher {setting.teacher}, {setting.teacher_steps} steps")
    result = _trained(run, setting.work / "teacher")
    say(f"teacher: held-out loss {result['loss']:.4f}, ECE {result['ece']:.4f}")
    return {"parameters": count_parameters(run.model_config()).total} | result


def _stored(setting: DistillExperiment, variant: Variant, say: Say) -> TeacherCard:
    out = setting.work / "scored" / variant.store
    out.parent.mkdir(exist_ok=True)
    card = store_teacher_logits(
        teacher=setting.work / "teacher",
        records=setting.records,
        out=out,
        method=variant.method,
        draws=variant.draws,
        k=variant.k,
    )
    say(
        f"{variant.store}: {card.tokens:,} tokens, {card.bytes_per_token:.1f} bytes per token, "
        f"{card.pairs / card.tokens:.1f} ids per token, mass left out {card.tail:.2%}"
    )
    return card


def _student(setting: DistillExperiment, variant: Variant, seed: int, say: Say) -> None:
    folder = folder_of(setting, variant, seed)
    if variant.method:
        _stored(setting, variant, lambda text: None)
    if _result(folder) is None:
        result = _trained(student_config(setting, variant, seed), folder)
        jax.clear_caches()  # programs of runs that are over
        say(
            f"{variant.name}, seed {seed}: held-out loss {result['loss']:.4f}, ECE "
            f"{result['ece']:.4f}, {result['seconds']:.0f} s"
        )


def calibration_error(workdir: pathlib.Path, records: str, rows: int = 64) -> float:
    """Expected calibration error of the most likely token, over all held-out target tokens.

    BINS bins of equal width by confidence; the mean of |accuracy - confidence|, weighted by
    tokens (arXiv 1706.04599).
    """
    config, params, _ = load_params_for_inference(workdir)
    model, opened = build_model(config), open_records(records)
    batches = Batches(
        opened, global_batch=rows, layout=config.architecture, shuffle=False, repeat=False
    )

    @jax.jit
    def sums(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        hidden = cast(jax.Array, model.apply({"params": params}, batch, method="hidden"))
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        if not config.is_encoder_decoder:
            hidden, targets, weights = loss_positions(hidden, batch, opened.card.targets_length)
        logits = cast(jax.Array, model.apply({"params": params}, hidden, method="logits"))
        log_probs = jax.nn.log_softmax(logits)
        confidence = jnp.exp(jnp.max(log_probs, axis=-1))
        correct = jnp.argmax(log_probs, axis=-1) == targets
        bin_ = jnp.minimum((confidence * BINS).astype(jnp.int32), BINS - 1)
        values = jnp.stack([jnp.ones_like(confidence), confidence, correct], axis=-1)
        zeros = jnp.zeros((BINS, 3), jnp.float32)
        return zeros.at[bin_.reshape(-1)].add((values * weights[..., None]).reshape(-1, 3))

    total = np.zeros((BINS, 3))
    for batch in batches.iterate():
        total += np.asarray(sums(params, batch), np.float64)
    return expected_calibration_error(*total.T)


def expected_calibration_error(
    count: np.ndarray, confidence: np.ndarray, correct: np.ndarray
) -> float:
    """From each bin's number of tokens, summed confidence and number of right answers."""
    return float(np.abs(confidence - correct).sum() / max(count.sum(), 1))


def step_ratios(
    setting: DistillExperiment, kinds: Sequence[Variant], steps: int = 5, rounds: int = 9
) -> dict[str, float]:
    """Median time of a student's step over that of the CE student, the two alternating.

    The batch is on the devices already; reading it is the loop's business and overlaps.
    """
    loops = {}
    for variant in kinds:
        run = student_config(setting, variant, 0)
        records = open_records(run.data.records)
        mesh = make_mesh(run.mesh)
        program = build_program(run, run.model_config(), mesh, records.card.targets_length)
        columns: list[RowFields] = (
            [open_teacher(run.distill.teacher, records)] if variant.method else []
        )
        batch = Batches(records, global_batch=run.batch_size, columns=columns)[0]
        loops[variant.name] = _Loop(program, jax.device_put(batch, program.batch_sharding))
    seconds = np.array([[loop.seconds(steps) for loop in loops.values()] for _ in range(rounds)])
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    return dict(zip(loops, map(float, ratios)))


class _Loop:
    """A student's jitted step on one batch."""

    def __init__(self, program: Any, batch: Any):
        self._program, self._batch, self._state = program, batch, program.init()
        self.seconds(2)

    def seconds(self, steps: int) -> float:
        """Of one step, the mean of several."""
        begin = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._program.train_step(self._state, self._batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - begin) / steps
