"""Does adaptation pay off? A decoder-only model, and models adapted from it, at equal FLOPs.

A decoder-only model is trained on text. Then, for as many FLOPs again as it would take to train it
on for ``further_steps`` steps: that model itself, encoder-decoders adapted from it, and
encoder-decoders of the same shapes from random parameters. All are compared by the held-out loss
of one prefix-LM set. Every run is a directory of its own, and what is finished is not run again.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from encdec.adapt.adapting import make_plan, write
from encdec.adapt.layer_choice import chosen_layers
from encdec.adapt.parameters import Choice
from encdec.adapt.sources import open_source
from encdec.cost.flops import count_parameters, training_flops
from encdec.data.corpora.stdlib import stdlib_text
from encdec.data.denoising import ul2
from encdec.data.objectives import CausalLM, PrefixLM
from encdec.data.prepare import prepare
from encdec.data.readers import BadRows, check_files, text_documents
from encdec.data.vocab_command import train_vocabulary
from encdec.data.vocabulary import CARD_FILE
from encdec.distill.scoring import score
from encdec.errors import ConfigError
from encdec.files import write_json
from encdec.jobs import claim_settings
from encdec.markup import markdown_table
from encdec.model import ModelConfig, preset
from encdec.saved.saved_config import CONFIG_FILE, model_config_of, read_config
from encdec.train.loop import train
from encdec.train.metrics import read_metrics
from encdec.train.run_config import RunConfig, parse_config

EXTRA_IDS = 136  # what UL2's sentinels and mode tokens take
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The settings; every field but ``work`` and ``seeds`` is part of the runs' identity.

    Attributes:
        work: receives everything.
        text, eval_text: files to learn from and to be held out; none: the standard library.
        model: preset of the source's widths; its layers are ``layers``.
        layers: of the source; the small adapted model splits them 2/3-1/3.
        steps: of the source's training.
        further_steps: that the source would be trained on for; sets everybody's FLOPs.
        inputs, targets: tokens of a row.
        batch_size: rows per step.
        vocabulary: ids, sentinels not among them.
        learning_rate: of all, at the peak.
        hold: part of a run in which all but drawn cross-attention waits.
        alpha: the teacher's weight where it teaches.
        evaluations: points of each curve.
        eval_rows: held-out rows of an evaluation, the same each time.
        documents: of the text that are read; 0: all.
        seeds: runs of each row.
    """

    work: pathlib.Path
    text: tuple[str, ...] = ()
    eval_text: tuple[str, ...] = ()
    model: str = "micro-3m"
    layers: int = 6
    steps: int = 3_000
    further_steps: int = 1_500
    inputs: int = 256
    targets: int = 64
    batch_size: int = 8
    vocabulary: int = 2_048
    learning_rate: float = 1e-3
    hold: float = 0.05
    alpha: float = 0.5
    evaluations: int = 8
    eval_rows: int = 512
    documents: int = 0
    seeds: int = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the line.
        layers: of the encoder and the decoder, as ``encdec adapt`` takes them; None: the source
            itself.
        cross_attention: where it starts from; "" in a model that starts from random parameters.
        objective: "prefix_lm" or "ul2".
        distilled: whether the source teaches.
        headline: whether it is run for every seed, and not for the first alone.
    """

    name: str
    layers: tuple[str, str] | None
    cross_attention: str = "self"
    objective: str = "prefix_lm"
    distilled: bool = False
    headline: bool = False

    @property
    def folder(self) -> str:
        return "".join(x if x.isalnum() else "-" for x in self.name)


def table_rows(setting: Setting) -> list[Row]:
    """The rows, those that matter most first."""
    third = setting.layers // 3
    split, whole = (str(setting.layers - third), str(third)), ("all", "all")
    return [
        Row("decoder-only, trained on", None, headline=True),
        Row("adapted 2/3-1/3", split, headline=True),
        Row("scratch 2/3-1/3", split, "", headline=True),
        Row("adapted all-all", whole, headline=True),
        Row("scratch all-all", whole, "", headline=True),
        Row("adapted all-all, zero", whole, "zero"),
        Row("adapted all-all, random", whole, "random"),
        Row("adapted all-all, merged", whole, "merged"),
        Row("adapted all-all, distilled", whole, distilled=True),
        Row("adapted all-all, UL2", whole, objective="ul2"),
        Row("scratch all-all, UL2", whole, "", objective="ul2"),
    ]


def run_experiment(setting: Setting, say: Say) -> dict[str, Any]:
    """Runs what is missing; returns all results, written to ``results.json`` after every run.

    Raises:
        ConfigError: settings that cannot be run, or others than in ``work``.
    """
    _check(setting)
    work = setting.work
    work.mkdir(parents=True, exist_ok=True)
    identity = {k: v for k, v in _plain(setting).items() if k not in ("work", "seeds")}
    path = work / "setting.json"
    claim_settings(
        path, identity, holder=work, remedy=f"give another --workdir, or those of {path}"
    )
    _make_records(setting, say)
    results: dict[str, Any] = {}
    for seed in range(setting.seeds):
        source = _source(setting, seed, say)
        for row in table_rows(setting):
            if seed and not row.headline:
                continue
            results.setdefault(row.name, []).append(_run(setting, row, seed, source, say))
            write_json(work / "results.json", {"setting": _plain(setting), "rows": results})
    return results


def _check(setting: Setting) -> None:
    if setting.layers < 3 or setting.layers % 3:
        raise ConfigError(
            f"--layers is {setting.layers}; expected a multiple of 3, so that it can be split"
        )
    if bool(setting.text) != bool(setting.eval_text):
        raise ConfigError("--text and --eval_text go together; give both, or neither")
    for name in ("steps", "further_steps", "evaluations", "seeds", "batch_size"):
        if getattr(setting, name) < 1:
            raise ConfigError(f"--{name} is {getattr(setting, name)}; expected 1 or more")


def _plain(setting: Setting) -> dict[str, Any]:
    return {
        k: str(v) if isinstance(v, pathlib.Path) else list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(setting).items()
    }


def _make_records(setting: Setting, say: Say) -> None:
    """Vocabulary and records: whole texts for the source, halves and UL2 for the others."""
    vocabulary = setting.work / "vocabulary.model"
    if not vocabulary.exists():
        say(f"a vocabulary of {setting.vocabulary:,} ids")
        texts: Any = stdlib_text("train")
        if setting.text:
            files = check_files(list(setting.text))
            texts = (text for (text,) in text_documents(files, BadRows()))
        train_vocabulary(texts, vocabulary, size=setting.vocabulary)
    whole = dict(inputs_length=0, targets_length=setting.inputs + setting.targets)
    halves = dict(inputs_length=setting.inputs, targets_length=setting.targets)
    for name, objective, lengths in (
        ("causal_lm", CausalLM(), whole),
        ("prefix_lm", PrefixLM(), halves),
        ("ul2", ul2(), halves),
        ("held_out", PrefixLM(), halves),
    ):
        out = setting.work / "records" / name
        if (out / CARD_FILE).is_file():
            continue
        held_out = name == "held_out"
        files = setting.eval_text if held_out else setting.text
        what: dict[str, Any] = {"text": list(files)} if files else {"task": "stdlib_text"}
        if not files:
            what["split"] = "validation" if held_out else "train"
        # One vocabulary for all, so that every model can read every set.
        card = prepare(
            out=out,
            vocabulary=vocabulary,
            extra_ids=EXTRA_IDS,
            objective=objective,
            workers=1,
            max_examples=setting.documents or None,
            **lengths,
            **what,
        )
        say(f"records {name}: {card.rows:,} rows, {card.target_tokens:,} target tokens")


def _records(setting: Setting, name: str) -> str:
    return str(setting.work / "records" / name)


def source_model(setting: Setting) -> ModelConfig:
    """The decoder-only source model."""
    return preset(
        setting.model,
        architecture="decoder_only",
        encoder_layers=0,
        decoder_layers=setting.layers,
        vocab_size=setting.vocabulary + EXTRA_IDS,
        kv_pairing="grouped",
        encoder_positions="from_zero",
        scan_layers=False,
    )


def _config(
    setting: Setting, model: ModelConfig, records: str, steps: int, seed: int, **changes: Any
) -> RunConfig:
    every = max(1, steps // setting.evaluations)
    return parse_config(
        {
            "model": setting.model,
            "model_overrides": model.changes_from(preset(setting.model)),
            "batch_size": setting.batch_size,
            "steps": steps,
            "seed": seed,
            "log_every": every,
            "data": {"records": records, "eval_records": _records(setting, "held_out")},
            "optimizer": {"learning_rate": setting.learning_rate, "weight_decay": 0.1},
            "schedule": {"warmup_steps": max(1, steps // 20) if steps > 1 else 0},
            "eval": {
                "every": every,
                "batch_size": setting.batch_size,
                "batches": max(1, setting.eval_rows // setting.batch_size),
            },
            "checkpoint": {"every": 0, "keep": 1},
        }
        | changes
    )


def _source(setting: Setting, seed: int, say: Say) -> pathlib.Path:
    """The trained decoder-only model of a seed; its held-out set is of other lengths, so none."""
    folder = setting.work / "runs" / f"source-{seed}"
    say(f"source, seed {seed}")
    run = _config(
        setting,
        source_model(setting),
        _records(setting, "causal_lm"),
        setting.steps,
        seed,
        data={"records": _records(setting, "causal_lm")},
        eval={"every": 0},
    )
    train(run, folder)
    return folder


def budget(setting: Setting) -> float:
    """FLOPs of every row beyond the source's."""
    return setting.further_steps * _step_flops(setting, source_model(setting))


def _step_flops(setting: Setting, model: ModelConfig) -> float:
    return training_flops(model, setting.inputs, setting.targets, batch_size=setting.batch_size)


def _run(setting: Setting, row: Row, seed: int, source: pathlib.Path, say: Say) -> dict[str, Any]:
    """Trains a row's model for the budget and gives its curve."""
    start = _start(setting, row, seed, source)
    model = model_config_of(read_config(start))
    per_step = _step_flops(setting, model)
    steps = max(1, round(budget(setting) / per_step))
    changes: dict[str, Any] = {}
    if row.layers is None or row.cross_attention:
        changes["init_from"] = str(start)
    if row.cross_attention in ("zero", "random") and round(setting.hold * steps) >= 1:
        changes["freeze"] = {
            "parameters": "*,!*/encoder_attention/*,!*/cross_attention_*",
            "steps": round(setting.hold * steps),
        }
    if row.distilled:
        changes["distill"] = {"teacher": _taught(setting, seed, source), "alpha": setting.alpha}
    say(f"{row.name}, seed {seed}: {steps:,} steps")
    run = _config(setting, model, _records(setting, row.objective), steps, seed + 100, **changes)
    folder = setting.work / "runs" / f"{row.folder}-{seed}"
    train(run, folder)
    curve = {
        int(line["step"]): line["eval/loss"] for line in read_metrics(folder) if "eval/loss" in line
    }
    return {
        "parameters": count_parameters(model).total,
        "flops_per_step": per_step,
        "curve": [[step, step * per_step, loss] for step, loss in sorted(curve.items())],
        "loss": curve[max(curve)],
    }


def _start(setting: Setting, row: Row, seed: int, source: pathlib.Path) -> pathlib.Path:
    """The model from which a row starts, or, from scratch, the model with its architecture."""
    if row.layers is None:
        return source
    how = row.cross_attention or "self"
    out = setting.work / "adapted" / f"{'-'.join(row.layers)}-{how}-{seed}"
    if not (out / CONFIG_FILE).is_file():
        opened = open_source(source, None, "the source")
        layers = [
            chosen_layers(text, opened.config.decoder_layers, "layers", str(source))
            for text in row.layers
        ]
        write(make_plan(opened, opened, Choice(*layers, how, seed=seed)), out, name=row.name)
    return out


def _taught(setting: Setting, seed: int, source: pathlib.Path) -> str:
    """The source's distributions on the prefix-LM records."""
    out = setting.work / "scored" / str(seed)
    score(teacher=str(source), records=_records(setting, "prefix_lm"), out=str(out))
    return str(out)


def summary(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The table as Markdown, and where the curves of models adapted and from scratch cross."""
    rows = []
    for name, runs in results.items():
        losses = np.array([run["loss"] for run in runs])
        spread = f" ± {losses.std(ddof=1):.3f}" if len(losses) > 1 else ""
        sizes = (f"{runs[0]['parameters']:,}", f"{runs[0]['curve'][-1][0]:,.0f}")
        rows.append((name, *sizes, f"{losses.mean():.3f}{spread}", str(len(runs))))
    head = ("model", "parameters", "steps", "held-out loss", "seeds")
    lines = [*markdown_table(head, rows), ""]
    for shape in ("2/3-1/3", "all-all", "all-all, UL2"):
        adapted, fresh = results.get(f"adapted {shape}"), results.get(f"scratch {shape}")
        if adapted and fresh:
            lines.append(_compared(shape, mean_curve(adapted), mean_curve(fresh)))
    return "\n".join(lines)


def mean_curve(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[points, 3]: step, FLOPs and the loss, a mean over the seeds."""
    return np.mean([run["curve"] for run in runs], axis=0)


def _compared(shape: str, adapted: np.ndarray, fresh: np.ndarray) -> str:
    worth = steps_worth(adapted, fresh)
    words = f"{shape}: " + (
        f"after {worth[0]:,.0f} steps the adapted model matches {worth[1]:,.0f} steps from scratch"
        if worth
        else "training from scratch reaches no loss of the adapted model's curve"
    )
    cross = crossing(adapted, fresh)
    return words + (
        f"; the curves cross at {cross:.3g} FLOPs"
        if cross
        else "; the curves do not cross: "
        + ("the adapted model" if adapted[-1, 2] <= fresh[-1, 2] else "the model from scratch")
        + " is ahead at the end"
    )


def steps_worth(adapted: np.ndarray, fresh: np.ndarray) -> tuple[float, float] | None:
    """A step of the adapted model, the earliest evaluated whose loss the fresh model reaches, and
    the step at which that does, between two of its evaluations by a straight line."""
    for step, _, loss in adapted:
        below = np.flatnonzero(fresh[:, 2] <= loss)
        if not below.size:
            continue
        place = int(below[0])
        if not place:
            return float(step), float(fresh[0, 0])
        (a, _, high), (b, _, low) = fresh[place - 1], fresh[place]
        return float(step), float(a + (b - a) * (high - loss) / (high - low))
    return None


def crossing(adapted: np.ndarray, fresh: np.ndarray) -> float | None:
    """FLOPs at which the better one becomes the worse, by straight lines between evaluations; None
    where it stays the better. Read off the data: nothing is fitted or extended."""
    flops = np.union1d(adapted[:, 1], fresh[:, 1])
    flops = flops[
        (flops >= max(adapted[0, 1], fresh[0, 1])) & (flops <= min(adapted[-1, 1], fresh[-1, 1]))
    ]
    gap = np.interp(flops, adapted[:, 1], adapted[:, 2]) - np.interp(
        flops, fresh[:, 1], fresh[:, 2]
    )
    changes = np.flatnonzero(np.sign(gap[:-1]) * np.sign(gap[1:]) < 0)
    if not changes.size:
        return None
    i = int(changes[-1])
    return float(flops[i] + (flops[i + 1] - flops[i]) * gap[i] / (gap[i] - gap[i + 1]))
