"""``encdec vocab``: train a SentencePiece vocabulary that is lossless for any text.

Identity normalization, no dummy prefix, white space kept, byte fallback for what training did
not see: code survives with its newlines, tabs and runs of spaces. One character does not, U+2581,
SentencePiece's own mark for a space.
"""

from __future__ import annotations

import io
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence

from encdec.data.prepare_settings import FIELD_FLAGS, PrepareSettings, choose_task
from encdec.data.readers import BadRows
from encdec.data.task_registry import TEXT_TASKS
from encdec.data.text_tasks import TextTask
from encdec.data.vocabulary import SentencePieceVocabulary, load_vocabulary
from encdec.errors import ConfigError, DataError
from encdec.files import write_bytes
from encdec.flags import Parser
from encdec.hub import data_path
from encdec.modules import add_module_flag, import_modules
from encdec.storage import any_path, as_path, make_directory, user_place

# SentencePiece leaves out training lines above 4192 bytes.
CHUNK_BYTES = 4000
SAMPLE_BYTES = 100 << 20
# BPE trains in seconds where unigram takes minutes, at the same characters a token on code.
MODEL_TYPES = ("bpe", "unigram")
# 256 bytes, pad, EOS, unk and a few characters.
SMALLEST = 300
THREADS = 4


def train_vocabulary(
    texts: Iterable[str],
    out: str | os.PathLike[str],
    *,
    size: int = 8192,
    model_type: str = "bpe",
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 0,
    overwrite: bool = False,
) -> SentencePieceVocabulary:
    """Train on texts and write the ``.model`` file ``out``; deterministic.

    ``size`` counts all ids: pad 0, EOS 1, unk 2, 256 bytes and learned pieces. More than
    ``sample_bytes`` of text are sampled evenly, by ``seed``, in pieces of 4 kB.

    Raises DataError where ``out`` exists or the text is too little for ``size``.
    """
    import sentencepiece

    out = as_path(user_place("--out", out))
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type is {model_type!r}; expected one of {', '.join(MODEL_TYPES)}")
    if not isinstance(size, int) or size < SMALLEST:
        raise ConfigError(
            f"size is {size!r}; expected {SMALLEST} or more: 259 ids are for bytes and special "
            "tokens"
        )
    if sample_bytes < CHUNK_BYTES:
        raise ConfigError(f"sample_bytes is {sample_bytes}; expected {CHUNK_BYTES} or more")
    if out.is_dir() or (out.exists() and not overwrite):
        raise DataError(f"{out} exists; give another --out, or --overwrite to replace a file")
    chunks = _sample(_chunks(texts), sample_bytes // CHUNK_BYTES, seed)
    if not chunks:
        raise DataError("no text to train a vocabulary on; give files or a task with text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            vocab_size=size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            # Fixed, since unigram's sums depend on how they are shared out.
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        hint = f"--size={most[1]} or less" if most else "a smaller --size"
        text_bytes = sum(len(chunk.encode("utf-8")) for chunk in chunks)
        raise DataError(
            f"a vocabulary of {size} cannot be learned from {text_bytes:,} bytes of text; give "
            f"more text or {hint} (SentencePiece: {error})"
        ) from error
    vocabulary = SentencePieceVocabulary(model.getvalue(), name=str(out))
    make_directory(out.parent)
    write_bytes(out, model.getvalue())
    return vocabulary


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of at most CHUNK_BYTES, cut at line ends where there are any."""
    for text in texts:
        held: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            for piece in _cut_line(line):
                length = len(piece.encode("utf-8"))
                if size + length > CHUNK_BYTES:
                    yield "".join(held)
                    held, size = [], 0
                held.append(piece)
                size += length
        if held:
            yield "".join(held)


def _cut_line(line: str) -> Iterator[str]:
    # A character is at most four bytes.
    for start in range(0, len(line), CHUNK_BYTES // 4):
        yield line[start : start + CHUNK_BYTES // 4]


def _sample(chunks: Iterable[str], count: int, seed: int) -> list[str]:
    """``count`` chunks drawn evenly (reservoir sampling, Vitter's R), in their order."""
    draw = random.Random(seed)
    kept: list[tuple[int, str]] = []
    for number, chunk in enumerate(chunks):
        if len(kept) < count:
            kept.append((number, chunk))
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = (number, chunk)
    return [chunk for _, chunk in sorted(kept)]


def task_texts(
    tasks: Sequence[TextTask], split: str = "train", max_bad_rows: int = 0
) -> Iterator[str]:
    """All texts of some tasks' documents, sources and targets alike."""
    bad_rows = BadRows(max_bad_rows)
    for task in tasks:
        if not task.objective.reads_text:
            raise DataError(
                f"task {task.name} has ids but no text to train a vocabulary on; give another task"
            )
        for document in task.documents(split, bad_rows):
            yield from document


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
    flags.add("--sample_bytes", "bytes of text used (default: 100 MiB)", int, SAMPLE_BYTES)
    flags.add("--seed", "seed of the sample", int, 0)
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
