"""Does adaptation pay off? A decoder-only model, and models adapted from it, at equal FLOPs.

A decoder-only model is trained on text. Then, for as many FLOPs again as it would take to train it
on for ``further_steps`` steps: that model itself, encoder-decoders adapted from it, and
encoder-decoders of the same shapes from random parameters, two of which get the FLOPs of the
source's training too. All are compared by the held-out loss of one prefix-LM set. Every run is a
directory of its own, and what is finished is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from encdec.adapt.adapting import make_plan, write
from encdec.adapt.layer_choice import chosen_layers
from encdec.adapt.parameters import Choice
from encdec.adapt.sources import open_source
from encdec.benchmarks.adaptation_results import KIND, SOURCE_FLOPS_TOO, read_lines
from encdec.cost.flops import count_parameters, forward_flops, training_flops
from encdec.data.card import read_card
from encdec.data.corpora.stdlib import stdlib_text
from encdec.data.denoising import ul2
from encdec.data.objectives import CausalLM, PrefixLM
from encdec.data.prepare import prepare
from encdec.data.readers import BadRows, check_files, text_documents
from encdec.data.vocabulary import CARD_FILE
from encdec.data.vocabulary_training import train_vocabulary
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.errors import ConfigError, DataError
from encdec.files import append_rows, write_text
from encdec.jobs import claim_settings
from encdec.logs import Say
from encdec.model import ModelConfig, preset
from encdec.result_lines import setting_digest, where_and_when
from encdec.saved.saved_config import CONFIG_FILE, model_config_of, read_config
from encdec.train.loop import train
from encdec.train.metrics import read_metrics
from encdec.train.run_config import RunConfig, parse_config

HELD_OUT_EVERY = 20  # one document in this many is held out where no other text is
EXTRA_IDS = 136  # what UL2's sentinels and mode tokens take
RECORDS = ("causal_lm", "prefix_lm", "ul2", "held_out")
Results = dict[str, list[dict[str, Any]]]  # lines of the results by row, one for each seed
Report = Callable[[Results], None]


@dataclasses.dataclass(frozen=True)
class AdaptationExperiment:
    """The settings; every field but ``work``, ``results``, ``seeds`` and ``rows`` is part of the
    runs' identity.

    Attributes:
        work: receives everything.
        text, eval_text: files to learn from and to be held out; without the latter every 20th
            document of the former is held out, without both they are the standard library.
        document_bytes: text taken from each document of ``text``, so that all are seen; 0: all.
        model: preset of the source's widths; its layers are ``layers``.
        layers: of the source; the small adapted model splits them 2/3-1/3.
        steps: of the source's training.
        further_steps: that the source would be trained on for; sets everybody's FLOPs.
        inputs, targets: tokens of a row.
        batch_size: rows per step.
        vocabulary: ids, sentinels not among them.
        optimizer: of all.
        learning_rate: at the peak, of all that start from random parameters.
        further_learning_rate: of those that start from the source's; 0: the same.
        hold: part of a run in which all but drawn cross-attention waits.
        alpha: the teacher's weight where it teaches.
        evaluations: points of each curve.
        eval_rows: held-out rows of an evaluation, the same each time.
        documents: of the text that are read; 0: all.
        seeds: runs of each headline row.
        rows: names of the rows that are run; none: all.
        results: receives a JSON line of every run; None: ``results.jsonl`` in ``work``.
    """

    work: pathlib.Path
    text: tuple[str, ...] = ()
    eval_text: tuple[str, ...] = ()
    document_bytes: int = 0
    model: str = "micro-3m"
    layers: int = 6
    steps: int = 3_000
    further_steps: int = 1_500
    inputs: int = 256
    targets: int = 64
    batch_size: int = 8
    vocabulary: int = 2_048
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    further_learning_rate: float = 0.0
    hold: float = 0.05
    alpha: float = 0.5
    evaluations: int = 8
    eval_rows: int = 512
    documents: int = 0
    seeds: int = 3
    rows: tuple[str, ...] = ()
    results: pathlib.Path | None = None

    @property
    def results_file(self) -> pathlib.Path:
        return self.results or self.work / "results.jsonl"


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One line of the table.

    Attributes:
        name: of the line.
        layers: of the encoder and the decoder, as ``encdec adapt`` takes them; None: the source
            itself.
        cross_attention: where it starts from; "" in a model that starts from random parameters.
        objective: "prefix_lm" or "ul2".
        distilled: whether the source teaches.
        headline: whether it is run for every seed, and not for the first alone.
        source_flops_too: whether its budget includes the FLOPs of the source's training.
    """

    name: str
    layers: tuple[str, str] | None
    cross_attention: Literal["self", "zero", "random", "merged", ""] = "self"
    objective: str = "prefix_lm"
    distilled: bool = False
    headline: bool = False
    source_flops_too: bool = False

    @property
    def folder(self) -> str:
        return "".join(x if x.isalnum() else "-" for x in self.name)


def table_rows(setting: AdaptationExperiment) -> list[TableRow]:
    """The rows, those that matter most first."""
    third = setting.layers // 3
    split, whole = (str(setting.layers - third), str(third)), ("all", "all")
    return [
        TableRow("decoder-only, trained on", None, headline=True),
        TableRow("adapted all-all", whole, headline=True),
        TableRow("scratch all-all", whole, "", headline=True),
        TableRow("adapted 2/3-1/3", split, headline=True),
        TableRow("scratch 2/3-1/3", split, "", headline=True),
        TableRow(f"scratch all-all{SOURCE_FLOPS_TOO}", whole, "", source_flops_too=True),
        TableRow(f"scratch 2/3-1/3{SOURCE_FLOPS_TOO}", split, "", source_flops_too=True),
        TableRow("adapted all-all, merged", whole, "merged"),
        TableRow("adapted all-all, distilled", whole, distilled=True),
        TableRow("adapted all-all, zero", whole, "zero"),
        TableRow("adapted all-all, random", whole, "random"),
        TableRow("adapted all-all, UL2", whole, objective="ul2"),
        TableRow("scratch all-all, UL2", whole, "", objective="ul2"),
    ]


def run_experiment(
    setting: AdaptationExperiment, say: Say, report: Report = lambda results: None
) -> Results:
    """Runs what is missing, and appends a line to the results after every run; returns all.

    ``report`` is given the results so far, first those of earlier calls.

    Raises:
        ConfigError: settings that cannot be run, or others than in ``work``.
        Preempted: SIGTERM came; a repeated call continues in the middle of the run.
    """
    _check(setting)
    work = setting.work
    work.mkdir(parents=True, exist_ok=True)
    open_to_change = ("work", "seeds", "rows", "results")
    identity = {k: v for k, v in _plain(setting).items() if k not in open_to_change}
    path = work / "setting.json"
    claim_settings(
        path, identity, holder=work, remedy=f"give another --workdir, or those of {path}"
    )
    _make_records(setting, say)
    digest = _digest(setting, identity)
    todo = _todo(setting, digest)
    _say_size(setting, todo, say)
    report(finished(setting, digest))
    sources: dict[int, pathlib.Path] = {}
    for seed, row in todo:
        if seed not in sources:
            sources[seed] = _source(setting, seed, say)
        line: dict[str, Any] = {"kind": KIND, "setting": digest, "row": row.name, "seed": seed}
        line |= _run(setting, row, seed, sources[seed], say)
        line |= {"source_flops": source_flops(setting)} | where_and_when()
        append_rows(setting.results_file, [line])
        report(finished(setting, digest))
    return finished(setting, digest)


def finished(setting: AdaptationExperiment, digest: str) -> Results:
    """The runs that are done, by row, in the order of the table and of seeds."""
    found = read_lines(setting.results_file, digest)
    return {
        row.name: [found[row.name][seed] for seed in sorted(found[row.name])]
        for row in table_rows(setting)
        if row.name in found
    }


def _digest(setting: AdaptationExperiment, identity: dict[str, Any]) -> str:
    """Names the settings and the text, by what all records made of it contain, but no paths."""
    paths = ("text", "eval_text")
    records = {name: read_card(_records(setting, name)).fingerprint for name in RECORDS}
    return setting_digest(
        {k: v for k, v in identity.items() if k not in paths} | {"records": records}
    )


def _todo(setting: AdaptationExperiment, digest: str) -> list[tuple[int, TableRow]]:
    """(seed, row) of the runs without a result, those that matter most first."""
    done = read_lines(setting.results_file, digest)
    return [
        (seed, row)
        for seed in range(setting.seeds)
        for row in table_rows(setting)
        if (row.headline or not seed)
        and (not setting.rows or row.name in setting.rows)
        and seed not in done.get(row.name, {})
    ]


def _say_size(setting: AdaptationExperiment, todo: list[tuple[int, TableRow]], say: Say) -> None:
    sources = len({seed for seed, _ in todo})
    flops = sources * source_flops(setting) + sum(budget(setting, row) for _, row in todo)
    steps = round(flops / _step_flops(setting, source_model(setting)))
    say(
        f"{len(todo)} runs and the source of {sources} seeds are left: {flops:.3g} FLOPs, "
        f"as many as {steps:,} steps of the source"
    )


def _check(setting: AdaptationExperiment) -> None:
    if setting.layers < 3 or setting.layers % 3:
        raise ConfigError(
            f"--layers is {setting.layers}; expected a multiple of 3, so that it can be split"
        )
    if setting.eval_text and not setting.text:
        raise ConfigError("--eval_text is given, but no --text; give both, or --text alone")
    for name in ("document_bytes", "further_learning_rate"):
        if getattr(setting, name) < 0:
            raise ConfigError(f"--{name} is {getattr(setting, name)}; expected 0 or more")
    names = [row.name for row in table_rows(setting)]
    if unknown := [name for name in setting.rows if name not in names]:
        raise ConfigError(f"--row: {unknown[0]!r} is unknown; expected some of {'; '.join(names)}")
    for name in ("steps", "further_steps", "evaluations", "seeds", "batch_size"):
        if getattr(setting, name) < 1:
            raise ConfigError(f"--{name} is {getattr(setting, name)}; expected 1 or more")


def _plain(setting: AdaptationExperiment) -> dict[str, Any]:
    return {
        k: str(v) if isinstance(v, pathlib.Path) else list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(setting).items()
    }


def _make_records(setting: AdaptationExperiment, say: Say) -> None:
    """Vocabulary and records: whole texts for the source, halves and UL2 for the others."""
    vocabulary = _vocabulary(setting)
    train, held_out = setting.text, setting.eval_text
    if setting.text:
        train, held_out = _write_texts(setting, say)
    if not vocabulary.exists():
        say(f"a vocabulary of {setting.vocabulary:,} ids")
        texts: Any = stdlib_text("train")
        if train:
            texts = (text for (text,) in text_documents(check_files(train), BadRows()))
        train_vocabulary(texts, vocabulary, size=setting.vocabulary)
    objectives = (CausalLM(), PrefixLM(), ul2(), PrefixLM())
    for name, objective in zip(RECORDS, objectives, strict=True):
        inputs, targets = _lengths(setting, name)
        out = setting.work / "records" / name
        if (out / CARD_FILE).is_file():
            continue
        files = held_out if name == "held_out" else train
        what: dict[str, Any] = {"text": list(files)} if files else {"task": "stdlib_text"}
        if not files:
            what["split"] = "validation" if name == "held_out" else "train"
        # One vocabulary for all, so that every model can read every set.
        card = prepare(
            out=out,
            vocabulary=vocabulary,
            extra_ids=EXTRA_IDS,
            objective=objective,
            workers=1,
            max_examples=setting.documents or None,
            inputs_length=inputs,
            targets_length=targets,
            **what,
        )
        say(f"records {name}: {card.rows:,} rows, {card.target_tokens:,} target tokens")


def _lengths(setting: AdaptationExperiment, records: str) -> tuple[int, int]:
    """Inputs and targets of a row of some records: the source's are targets as a whole."""
    whole = setting.inputs + setting.targets
    return (0, whole) if records == "causal_lm" else (setting.inputs, setting.targets)


def _vocabulary(setting: AdaptationExperiment) -> pathlib.Path:
    return setting.work / "vocabulary.model"


def _write_texts(
    setting: AdaptationExperiment, say: Say
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files to learn from and held out: excerpts of all documents, written once."""
    folder = setting.work / "text"
    parts = {name: folder / f"{name}.jsonl" for name in ("train", "held_out")}
    if not all(path.is_file() for path in parts.values()):
        taken: dict[str, list[str]] = {"train": [], "held_out": []}
        for number, text in enumerate(_excerpts(setting, setting.text)):
            held = not setting.eval_text and number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            taken["held_out" if held else "train"].append(text)
        taken["held_out"] += _excerpts(setting, setting.eval_text)
        if not taken["held_out"]:
            raise DataError(
                f"--text has {len(taken['train'])} documents; give {HELD_OUT_EVERY} or more, so "
                "that one can be held out, or --eval_text"
            )
        folder.mkdir(exist_ok=True)
        for name, texts in taken.items():
            say(f"text, {name}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")
            write_text(parts[name], "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return (str(parts["train"]),), (str(parts["held_out"]),)


def _excerpts(setting: AdaptationExperiment, files: tuple[str, ...]) -> Iterator[str]:
    """The beginning of every document."""
    for (text,) in text_documents(check_files(files), BadRows()) if files else ():
        most = setting.document_bytes or None
        yield text.encode()[:most].decode(errors="ignore")


def _records(setting: AdaptationExperiment, name: str) -> str:
    return str(setting.work / "records" / name)


def source_model(setting: AdaptationExperiment) -> ModelConfig:
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
    setting: AdaptationExperiment,
    model: ModelConfig,
    records: str,
    steps: int,
    seed: int,
    **changes: Any,
) -> RunConfig:
    every = max(1, round(steps / setting.evaluations))
    return parse_config(
        {
            "model": setting.model,
            "model_overrides": model.changes_from(preset(setting.model)),
            "batch_size": setting.batch_size,
            "steps": steps,
            "seed": seed,
            "log_every": every,
            "data": {"records": records, "eval_records": _records(setting, "held_out")},
            "optimizer": _optimizer(setting, setting.learning_rate),
            "schedule": {"warmup_steps": max(1, steps // 20) if steps > 1 else 0},
            "eval": {
                "every": every,
                "batch_size": setting.batch_size,
                "batches": max(1, setting.eval_rows // setting.batch_size),
                "at_start": True,
            },
            "checkpoint": {"every": 0, "keep": 1},
        }
        | changes
    )


def _optimizer(setting: AdaptationExperiment, learning_rate: float) -> dict[str, Any]:
    return {"name": setting.optimizer, "learning_rate": learning_rate, "weight_decay": 0.1}


def _source(setting: AdaptationExperiment, seed: int, say: Say) -> pathlib.Path:
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


def source_flops(setting: AdaptationExperiment) -> float:
    """FLOPs of the source's training, in which every token of a row is a target."""
    return setting.steps * _step_flops(setting, source_model(setting), "causal_lm")


def teacher_flops(setting: AdaptationExperiment) -> float:
    """FLOPs of the source's reading all rows whose logits are stored, once; its child's budget, of
    training alone, does not include them."""
    rows = read_card(_records(setting, "prefix_lm")).rows
    return forward_flops(
        source_model(setting), setting.inputs, setting.targets, batch_size=rows
    ).total


def budget(setting: AdaptationExperiment, row: TableRow) -> float:
    """FLOPs of a row's own training: as many for all, and the source's too where it has them."""
    further = setting.further_steps * _step_flops(setting, source_model(setting))
    return further + row.source_flops_too * source_flops(setting)


def _step_flops(
    setting: AdaptationExperiment, model: ModelConfig, records: str = "prefix_lm"
) -> float:
    return training_flops(model, *_lengths(setting, records), batch_size=setting.batch_size)


def _run(
    setting: AdaptationExperiment, row: TableRow, seed: int, source: pathlib.Path, say: Say
) -> dict[str, Any]:
    """Trains a row's model for the budget and gives its curve."""
    start = _start(setting, row, seed, source)
    model = model_config_of(read_config(start))
    per_step = _step_flops(setting, model)
    steps = max(1, round(budget(setting, row) / per_step))
    changes: dict[str, Any] = {}
    if row.layers is None or row.cross_attention:
        changes["init_from"] = str(start)
        peak = setting.further_learning_rate or setting.learning_rate
        changes["optimizer"] = _optimizer(setting, peak)
    if row.cross_attention in ("zero", "random") and round(setting.hold * steps) >= 1:
        changes["freeze"] = {
            "parameters": "*,!*/encoder_attention/*,!*/cross_attention_*",
            "steps": round(setting.hold * steps),
        }
    if row.distilled:
        changes["distill"] = {"teacher": _taught(setting, seed, source), "alpha": setting.alpha}
    say(f"{row.name}, seed {seed}: {steps:,} steps, {steps * per_step:.3g} FLOPs")
    run = _config(setting, model, _records(setting, row.objective), steps, seed + 100, **changes)
    folder = setting.work / "runs" / f"{row.folder}-{seed}"
    train(run, folder)
    curve = {
        int(line["step"]): line["eval/loss"] for line in read_metrics(folder) if "eval/loss" in line
    }
    return {
        "parameters": count_parameters(model).total,
        "teacher_flops": teacher_flops(setting) if row.distilled else 0.0,
        "flops_per_step": per_step,
        "curve": [[step, step * per_step, loss] for step, loss in sorted(curve.items())],
        "loss": curve[max(curve)],
    }


def _start(
    setting: AdaptationExperiment, row: TableRow, seed: int, source: pathlib.Path
) -> pathlib.Path:
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
        write(
            make_plan(opened, opened, Choice(layers[0], layers[1], how, seed=seed)),
            out,
            name=row.name,
        )
    return out


def _taught(setting: AdaptationExperiment, seed: int, source: pathlib.Path) -> str:
    """The source's distributions on the prefix-LM records."""
    out = setting.work / "scored" / str(seed)
    store_teacher_logits(teacher=str(source), records=_records(setting, "prefix_lm"), out=str(out))
    return str(out)
