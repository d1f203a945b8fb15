"""Faults put into a copy of the tree one at a time, to see whether the tests notice.

``make mutants`` runs them all, ``make mutants PACKAGE=train`` those of one package. A fault that
survives is a gap in the tests that it names: add or sharpen one. To add a fault, enter it in
``MUTANTS``; ``tests/test_mutants.py`` holds every ``before`` to the code as it is now.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("encdec", "tests", "configs", "gin", "launch", "pytest.ini", "setup.py", "Makefile")
TESTS_FAILED, NOTHING_FAILED = 1, 0  # pytest's exit codes; all others say that it could not run
LONGEST_SECONDS = 900


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault: ``before``, found once in ``file``, becomes ``after``; ``tests`` should fail."""

    fault: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    @property
    def package(self) -> str:
        return self.file.split("/")[1]

    def apply(self, text: str) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: ``before`` is not there exactly once: the code has changed, and the list
                has to follow.
        """
        if (found := text.count(self.before)) != 1:
            raise ValueError(
                f"{self.fault}: {self.file} has the text {self.before!r} {found} times, expected "
                "once; rewrite the mutant for the code as it is now"
            )
        return text.replace(self.before, self.after)


MUTANTS = (
    Mutant(
        "sentinels ascend from the lowest extra id",
        "encdec/data/denoising.py",
        "sentinels = np.arange(vocabulary.size - 1, vocabulary.base_size - 1, -1, dtype=np.int32)",
        "sentinels = np.arange(vocabulary.base_size, vocabulary.size, dtype=np.int32)",
        ("tests/data/test_denoising.py",),
    ),
    Mutant(
        "decoder positions start at 1 in records-to-batch",
        "encdec/data/features.py",
        '"decoder_positions": target.ramps(nothing, target_ids),',
        '"decoder_positions": target.ramps(nothing + 1, target_ids),',
        ("tests/data/test_features.py",),
    ),
    Mutant(
        "packing: segments of a row all numbered 1",
        "encdec/data/features.py",
        "        number=number + 1,",
        "        number=np.ones_like(number),",
        ("tests/data/test_features.py",),
    ),
    Mutant(
        "packing: greedy row overfilled by one target token",
        "encdec/data/packing.py",
        "if example % window == 0 or used_source > S or used_target > T:",
        "if example % window == 0 or used_source > S or used_target > T + 1:",
        ("tests/data/test_packing.py",),
    ),
    Mutant(
        "records fingerprint ignores decoder_start_id",
        "encdec/data/card.py",
        "        targets_length,\n        decoder_start_id,\n        [(shard.rows",
        "        targets_length,\n        [(shard.rows",
        ("tests/train/test_identity.py::test_the_records_fingerprint",),
    ),
    Mutant(
        "records fingerprint ignores the vocabulary",
        "encdec/data/card.py",
        "        FORMAT_VERSION,\n        vocabulary.fingerprint,\n        inputs_length,",
        "        FORMAT_VERSION,\n        inputs_length,",
        ("tests/train/test_identity.py::test_the_records_fingerprint",),
    ),
    Mutant(
        "shuffle ignores the epoch",
        "encdec/data/shuffle.py",
        "order_seed = epoch_order_seed(seed, int(epoch))",
        "order_seed = epoch_order_seed(seed, 0)",
        ("tests/data/test_shuffle.py",),
    ),
    Mutant(
        "beam length penalty inverted",
        "encdec/inference/beam_steps.py",
        "final_BxC = jnp.where(ended_BxC, totals_BxC / length_penalty(count, alpha), -jnp.inf)",
        "final_BxC = jnp.where(ended_BxC, totals_BxC * length_penalty(count, alpha), -jnp.inf)",
        ("tests/inference/test_beam.py::test_wide_beams_find_the_best_of_all_answers",),
    ),
    Mutant(
        "beam search stops too early",
        "encdec/inference/beam_steps.py",
        "hope_B = alive.totals_BxK[:, 0] / length_penalty(limit, alpha)",
        "hope_B = alive.totals_BxK[:, 0] / length_penalty(alive.counts_BxK[:, 0], alpha)",
        (
            "tests/inference/test_beam.py::test_narrow_beams_stop_early_only_where_nothing_better_can_come",
        ),
    ),
    Mutant(
        "cache slot off by one after the prompt",
        "encdec/inference/decoding.py",
        "Memory(cache, source, ends_B.astype(jnp.int32) + 1)",
        "Memory(cache, source, ends_B.astype(jnp.int32) + 2)",
        (
            "tests/inference/test_decoding.py::test_greedy_equals_full_passes_in_a_batch_of_mixed_lengths",
        ),
    ),
    Mutant(
        "nucleus keeps one token more",
        "encdec/inference/sampling.py",
        "return jnp.where(kept >= wanted_R, higher_R, floor_R)",
        "return jnp.where(kept > wanted_R, higher_R, floor_R)",
        ("tests/inference/test_sampling.py",),
    ),
    Mutant(
        "cached query does not read its own slot",
        "encdec/model/cache.py",
        "mask_BxNxC = jnp.arange(capacity) <= positions_BxN[..., None]",
        "mask_BxNxC = jnp.arange(capacity) < jnp.maximum(positions_BxN[..., None], 1)",
        (
            "tests/inference/test_decoding.py::test_greedy_equals_full_passes_in_a_batch_of_mixed_lengths",
        ),
    ),
    Mutant(
        "cross-attention drops the segment mask",
        "encdec/model/encoder_decoder.py",
        "_cross_attention(\n            cross.mask_BxTxS,",
        "_cross_attention(\n            cross.mask_BxTxS | (source_segments[:, None] > 0),",
        ("tests/model/test_models.py::test_packed_rows_equal_their_segments_alone",),
    ),
    Mutant(
        "tiled KV pairing read as grouped in the kernel wrappers",
        "encdec/model/kernels.py",
        'if config.kv_pairing == "grouped" or config.num_kv_heads in (1, config.num_heads):',
        "if True:",
        ("tests/model/test_kernels.py::test_splash_equals_xla",),
    ),
    Mutant(
        "centred encoder positions: centre of the row, not of the segment",
        "encdec/model/positions.py",
        "return positions_BxS - (segment_lengths(positions_BxS, segments_BxS) - 1) // 2",
        "return positions_BxS - (positions_BxS.shape[-1] - 1) // 2",
        ("tests/model/test_layers.py::test_centred_positions_are_of_each_segment",),
    ),
    Mutant(
        "best checkpoint: highest loss kept",
        "encdec/train/checkpoints.py",
        "known = sorted((losses[step], step) for",
        "known = sorted((-losses[step], step) for",
        ("tests/train/test_checkpoints.py::test_newest_best_and_periodic_ones_stay",),
    ),
    Mutant(
        "work-directory identity ignores the optimizer",
        "encdec/train/run_config.py",
        '    "profile.",\n)',
        '    "profile.",\n    "optimizer.",\n)',
        ("tests/train/test_identity.py",),
    ),
    Mutant(
        "distillation: T^2 forgotten for stored",
        "encdec/train/distillation_losses.py",
        "            beta,\n        )\n    return losses_BxT * temperature**2",
        "            beta,\n        )\n    return losses_BxT",
        (
            "tests/train/test_distillation_losses.py::test_stored_rows_give_the_dense_sums_in_float64_with_masks",
        ),
    ),
    Mutant(
        "distillation: T^2 forgotten for sampled rows",
        "encdec/train/distillation_losses.py",
        'divergence == "forward_kl" else 0.0\n        return losses_BxT * temperature**2',
        'divergence == "forward_kl" else 0.0\n        return losses_BxT',
        ("tests/train/test_distillation_losses.py::test_sampled_rows_follow_their_definition",),
    ),
    Mutant(
        "alpha warmup one step late",
        "encdec/train/distillation_losses.py",
        "alpha * jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))",
        "alpha * jnp.minimum(1.0, step / max(1, warmup_steps))",
        ("tests/train/test_distillation_losses.py::test_alpha_schedules",),
    ),
    Mutant(
        "patience: an equal loss counts as lower",
        "encdec/train/session.py",
        "min(losses[-patience:]) >= min(losses[:-patience])",
        "min(losses[-patience:]) > min(losses[:-patience])",
        ("tests/train/test_warm_start.py::test_patience_counts_evaluations_without_a_lower_loss",),
    ),
    Mutant(
        "a resumed run reads the batch of step + 1",
        "encdec/train/session.py",
        "on_devices(batches, sharding, self.step, self.stop)",
        "on_devices(batches, sharding, self.step + (self.step > 0), self.stop + (self.step > 0))",
        ("tests/train/test_loop.py::test_a_resumed_run_ends_in_the_same_bits",),
    ),
    Mutant(
        "label smoothing with wrong mass",
        "encdec/train/losses.py",
        "objective += config.label_smoothing * (log_normaliser - mean - cross_entropy)",
        "objective += config.label_smoothing * (log_normaliser - mean)",
        ("tests/train/test_losses.py::test_sums_follow_the_definitions",),
    ),
    Mutant(
        "bits per byte: evaluated share of bytes not scaled",
        "encdec/train/metrics.py",
        "text_bytes = target_bytes * tokens / max(target_tokens, 1)",
        "text_bytes = float(target_bytes)",
        (
            "tests/train/test_losses.py::test_a_sample_of_the_rows_is_set_against_its_share_of_the_bytes",
        ),
    ),
    Mutant(
        "clipping removed altogether",
        "encdec/train/optimizer.py",
        "optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()",
        "optax.identity()",
        (
            "tests/train/test_optimizer.py::test_gradients_are_clipped_by_their_global_norm_before_the_rule",
        ),
    ),
    Mutant(
        "clip applied after the update rule instead of before",
        "encdec/train/optimizer.py",
        "optimizer = optax.chain(clip, rule(0))",
        "optimizer = optax.chain(rule(0), clip)",
        (
            "tests/train/test_optimizer.py::test_gradients_are_clipped_by_their_global_norm_before_the_rule",
        ),
    ),
    Mutant(
        "weight decay on norm scales",
        "encdec/train/optimizer.py",
        '_VECTORS = ("bias", "scale")',
        '_VECTORS = ("bias",)',
        ("tests/train/test_optimizer.py::test_only_matrices_decay",),
    ),
    Mutant(
        "dropout key ignores the step",
        "encdec/train/state.py",
        "return jax.random.fold_in(jax.random.key(seed), step)",
        "return jax.random.fold_in(jax.random.key(seed), 0 * step)",
        ("tests/train/test_step.py::test_dropout_follows_from_seed_and_step_alone",),
    ),
    Mutant(
        "loss/gradient divided by all positions, padding included",
        "encdec/train/step.py",
        "count = jnp.maximum(metrics.losses.weight, 1.0)",
        'count = jnp.float32(batch["decoder_loss_weights"].size)',
        ("tests/train/test_step.py::test_the_gradient_is_of_the_mean_over_target_tokens",),
    ),
    Mutant(
        "accumulated gradients averaged, not summed",
        "encdec/train/step.py",
        "lambda g, p: summed(g.astype(p.dtype)), gradients, params",
        "lambda g, p: summed(g.astype(p.dtype)) / pieces, gradients, params",
        ("tests/train/test_step.py::test_four_micro_batches_equal_one_batch",),
    ),
    Mutant(
        "dropout key the same in every micro-batch",
        "encdec/train/step.py",
        "new = one(params, micro_batch, jax.random.fold_in(key, index), alpha)",
        "new = one(params, micro_batch, jax.random.fold_in(key, 0 * index), alpha)",
        ("tests/train/test_step.py::test_micro_batches_have_dropout_keys_of_their_own",),
    ),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a mutant: "killed", "survived" or "error", and by which test or why."""

    mutant: Mutant
    outcome: str
    reason: str
    seconds: float


def run(mutants: list[Mutant], folder: pathlib.Path, arguments: list[str]) -> Iterator[Verdict]:
    """Runs each mutant's tests in a copy of the tree below ``folder``, one mutant at a time."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
            )
        else:
            shutil.copy(source, folder / name)
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",  # a stale .pyc of the same second would hide a fault
    }
    where = subprocess.run(
        [sys.executable, "-c", "import encdec; print(encdec.__file__)"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if pathlib.Path(where).resolve().parent != (folder / "encdec").resolve():
        raise RuntimeError(f"the copy's tests would import {where}, not the copy in {folder}")
    for mutant in mutants:
        path = folder / mutant.file
        text = path.read_text(encoding="utf-8")
        path.write_text(mutant.apply(text), encoding="utf-8")
        started = time.monotonic()
        try:
            outcome, reason = _verdict(mutant, folder, environment, arguments)
        finally:
            path.write_text(text, encoding="utf-8")
        yield Verdict(mutant, outcome, reason, time.monotonic() - started)


def _verdict(
    mutant: Mutant, folder: pathlib.Path, environment: dict[str, str], arguments: list[str]
) -> tuple[str, str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(
            [*command, *mutant.tests],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "error", f"its tests did not end in {LONGEST_SECONDS} s"
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == TESTS_FAILED and failed:
        return "killed", failed[1]
    if done.returncode == NOTHING_FAILED:
        if not re.search(r"\b\d+ passed", done.stdout):
            return "error", "all of its tests were skipped here"
        return "survived", ", ".join(mutant.tests)
    return "error", (done.stdout + done.stderr).strip()[-2000:]


def main(argv: list[str]) -> int:
    """Runs the mutants chosen; 0 if tests killed every one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    packages = sorted({mutant.package for mutant in MUTANTS})
    parser.add_argument("--package", default="", choices=["", *packages], help="of these alone")
    parser.add_argument("--fault", default="", metavar="TEXT", help="faults whose name has TEXT")
    parser.add_argument(
        "--baseline", action="store_true", help="first run all their tests without a fault"
    )
    parser.add_argument("--list", action="store_true", help="print the faults and their tests")
    options, arguments = parser.parse_known_args(argv)  # the rest is pytest's
    chosen = [
        mutant
        for mutant in MUTANTS
        if mutant.package == (options.package or mutant.package) and options.fault in mutant.fault
    ]
    for mutant in chosen:
        mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
        if options.list:
            print(f"{mutant.file}: {mutant.fault} [{', '.join(mutant.tests)}]")
    if options.list or not chosen:
        return not chosen
    if options.baseline:
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", *tests], cwd=ROOT, check=True)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="encdec-mutants-") as folder:
        for verdict in run(chosen, pathlib.Path(folder), arguments):
            verdicts.append(verdict)
            print(
                f"{verdict.outcome:9}{verdict.seconds:5.0f} s  {verdict.mutant.file}: "
                f"{verdict.mutant.fault} [{verdict.reason}]",
                flush=True,
            )
    killed = sum(verdict.outcome == "killed" for verdict in verdicts)
    print(f"{killed} of {len(verdicts)} mutants killed")
    return int(killed < len(verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
