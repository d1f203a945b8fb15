"""``encdec vocab``: trains a vocabulary on text."""

from __future__ import annotations

import time

from encdec.data.prepare_settings import FIELD_FLAGS, PrepareSettings, choose_task
from encdec.data.task_registry import TEXT_TASKS
from encdec.data.vocabulary import load_vocabulary
from encdec.data.vocabulary_training import MODEL_TYPES, SAMPLE_BYTES, task_texts, train_vocabulary
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.hub import data_path
from encdec.modules import add_module_flag, import_modules
from encdec.storage import any_path


def parser() -> Parser:
    flags = Parser(prog="encdec vocab", description="Train a vocabulary.")
    tasks = ", ".join(TEXT_TASKS)
    flags.add("--task", f"train on a task's text: {tasks}", action="append")
    flags.add("--jsonl", "rows with source and target", data_path, nargs="+", metavar="FILE")
    flags.add("--text", "text, or rows with text", data_path, nargs="+", metavar="FILE")
    for name in FIELD_FLAGS:
        field = PrepareSettings.__dataclass_fields__[name]
        flags.add_argument(f"--{name}", **field.metadata["flag"])
    flags.add("--split", "the task's split (train)")
    flags.add("--size", "ids, with 259 for bytes", int, 8192)
    flags.add("--model_type", "how pieces are learned", default="bpe", choices=MODEL_TYPES)
    flags.add("--sample_bytes", "bytes of text used (default: 100 MiB)", int, SAMPLE_BYTES, least=1)
    flags.add("--seed", "seed of the sample", int, 0, least=0)
    flags.add("--max_bad_rows", "bad rows to leave out and count", int, 0, least=0)
    flags.add("--out", "the .model file to write", any_path, required=True, metavar="FILE")
    flags.add("--overwrite", "replace the file", default=False)
    add_module_flag(flags)
    return flags


def main(argv: list[str]) -> int:
    """``encdec vocab``."""
    flags = parser().parse_args(argv)
    import_modules(flags.module)
    sources = [choose_task(name) for name in flags.task or ()]
    if flags.jsonl:
        fields = {"source_field": flags.source_field, "target_field": flags.target_field}
        sources.append(choose_task(None, jsonl=flags.jsonl, fields=fields))
    if flags.text:
        fields = {"text_field": flags.text_field}
        sources.append(choose_task(None, text=flags.text, fields=fields))
    for name in FIELD_FLAGS:
        owner = "text" if name == "text_field" else "jsonl"
        if getattr(flags, name) is not None and not getattr(flags, owner):
            raise ConfigError(f"--{name} is for files of --{owner}; leave it out")
    if flags.split is not None and not flags.task:
        raise ConfigError(f"--split={flags.split} is for --task: files have no splits")
    if not sources:
        raise ConfigError("give text to train on with --task, --jsonl or --text")
    started = time.perf_counter()
    train_vocabulary(
        task_texts(sources, flags.split or "train", flags.max_bad_rows),
        flags.out,
        size=flags.size,
        model_type=flags.model_type,
        sample_bytes=flags.sample_bytes,
        seed=flags.seed,
        overwrite=flags.overwrite,
    )
    vocabulary = load_vocabulary(flags.out)
    seconds = time.perf_counter() - started
    print(
        f"vocabulary: {flags.out}, {vocabulary.size:,} ids, fingerprint "
        f"{vocabulary.fingerprint[:16]}, {seconds:.1f} s"
    )
    return 0
