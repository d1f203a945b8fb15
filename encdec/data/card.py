"""The card of a records directory, ``dataset.json``: what the directory holds, and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from encdec.data.vocabulary import CARD_FILE, VocabularySpec
from encdec.errors import DataError
from encdec.fields import did_you_mean
from encdec.files import write_json
from encdec.jobs import Shard
from encdec.storage import as_path, user_place

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class DatasetCard:
    """What a records directory holds; ``dataset.json``, written last.

    Lengths are tokens per packed row. Token counts include EOS and exclude padding;
    ``target_bytes`` are the UTF-8 bytes of text the target tokens stand for. ``truncated`` counts
    examples and tokens cut off, ``dropped`` what was left out, by reason; ``lost`` is what the
    vocabulary cannot write (``vocabulary_losses.Losses``; empty in cards of before it was counted).
    ``fits`` counts the examples that are whole within usual lengths ("sources 256"), for pairs
    alone. ``inputs_prefix`` are ids in front of every source, counted like others.
    ``origin`` says where the text came from (file names, Python's version).
    """

    task: str
    split: str
    origin: dict[str, Any]
    vocabulary: VocabularySpec
    inputs_length: int
    targets_length: int
    packing: str
    inputs_eos: bool
    objective: dict[str, Any]
    seed: int
    decoder_start_id: int
    token_dtype: str
    rows: int
    examples: int
    documents: int
    source_tokens: int
    target_tokens: int
    target_bytes: int
    non_padding_share: float
    truncated: dict[str, int]
    dropped: dict[str, int]
    shards: tuple[Shard, ...]
    fingerprint: str
    format_version: int = FORMAT_VERSION
    lost: dict[str, Any] = dataclasses.field(default_factory=dict)
    fits: dict[str, int] = dataclasses.field(default_factory=dict)
    inputs_prefix: tuple[int, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether a row may hold more than one example."""
        return self.packing != "none"

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["packed"] = self.packed
        content["shards"] = [dataclasses.asdict(shard) for shard in self.shards]
        return content

    def write(self, directory: str | pathlib.Path) -> None:
        """Write ``dataset.json`` atomically: it is there in full or not at all."""
        write_json(as_path(directory) / CARD_FILE, self.to_dict())


def read_card(directory: str | pathlib.Path) -> DatasetCard:
    """The card of a records directory; DataError where it is missing, broken or too new."""
    directory = as_path(user_place("the records directory", directory))
    path = directory / CARD_FILE
    if not directory.is_dir():
        raise DataError(
            f"records directory {directory} does not exist; make it with "
            f"encdec prepare --out={directory}"
        )
    if not path.is_file():
        raise DataError(
            f"{directory} has no {CARD_FILE}: its preparation did not finish, or it holds no "
            f"records; run encdec prepare --out={directory} again"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON ({error}); prepare again") from error
    return _card_from_dict(content, path)


def _card_from_dict(content: Any, path: pathlib.Path) -> DatasetCard:
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, expected an object")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version {version!r}, this encdec reads {FORMAT_VERSION}; "
            "use the version that wrote it or prepare again"
        )
    names = {field.name for field in dataclasses.fields(DatasetCard)}
    values = {key: value for key, value in content.items() if key != "packed"}
    for key in values:
        if key not in names:
            raise DataError(f"{path} has the unknown field {key!r}{did_you_mean(key, names)}")
    if missing := names - set(values) - {"lost", "fits", "inputs_prefix"}:
        raise DataError(f"{path} lacks {sorted(missing)}; prepare again")
    try:
        values["vocabulary"] = VocabularySpec(**values["vocabulary"])
        values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
        values["inputs_prefix"] = tuple(map(int, values.get("inputs_prefix", ())))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is malformed: {error}; prepare again") from error
    return DatasetCard(**values)


# What the records of a mixture, or of training and evaluation, have in common.
MUST_AGREE: dict[str, Callable[[DatasetCard], object]] = {
    "the vocabulary's fingerprint": lambda card: card.vocabulary.fingerprint[:16],
    "inputs_length": lambda card: card.inputs_length,
    "targets_length": lambda card: card.targets_length,
    "decoder_start_id": lambda card: card.decoder_start_id,
    "inputs_prefix": lambda card: list(card.inputs_prefix),
}


def token_dtype(vocabulary_size: int, inputs_length: int, targets_length: int) -> str:
    """ "uint16" where ids and lengths fit it, else "uint32"."""
    fits = vocabulary_size <= 2**16 and max(inputs_length, targets_length) < 2**16
    return "uint16" if fits else "uint32"


def content_fingerprint(
    shards: Sequence[Shard],
    vocabulary: VocabularySpec,
    inputs_length: int,
    targets_length: int,
    decoder_start_id: int,
    inputs_prefix: Sequence[int] = (),
) -> str:
    """sha256 over all that a teacher's column or a run must agree on with the records.

    Without a prefix it is that of records from before there was one.
    """
    content: list[object] = [
        FORMAT_VERSION,
        vocabulary.fingerprint,
        inputs_length,
        targets_length,
        decoder_start_id,
        [(shard.rows, shard.sha256) for shard in shards],
    ]
    if inputs_prefix:
        content.append({"inputs_prefix": list(inputs_prefix)})
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
