"""Trains a SentencePiece vocabulary that is lossless for any text.

Identity normalization, no dummy prefix, white space kept, byte fallback for what training did
not see: code survives with its newlines, tabs and runs of spaces. One character does not, U+2581,
SentencePiece's own mark for a space.
"""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence

from encdec.data.readers import BadRows
from encdec.data.text_tasks import TextTask
from encdec.data.vocabulary import SentencePieceVocabulary
from encdec.errors import ConfigError, DataError
from encdec.files import write_bytes
from encdec.storage import as_path, make_directory, user_place

# SentencePiece leaves out training lines above 4192 bytes.
CHUNK_BYTES = 4000
RESERVED = "\u2585"  # SentencePiece leaves out lines that hold it, without a word
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
    for text in (part for whole in texts for part in whole.split(RESERVED)):
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
    """All texts of some tasks' documents, both sources and targets."""
    bad_rows = BadRows(max_bad_rows)
    for task in tasks:
        if not task.objective.reads_text:
            raise DataError(
                f"task {task.name} has ids but no text to train a vocabulary on; give another task"
            )
        for document in task.documents(split, bad_rows):
            yield from document
