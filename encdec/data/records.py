"""Records by name: one directory, or a mixture of several, to read rows of."""

from __future__ import annotations

import os
import pathlib
from typing import cast

from encdec.buckets import is_address
from encdec.data.card import DatasetCard, Shard, content_fingerprint, read_card, token_dtype
from encdec.data.mixing import mix_records, parse_mixture
from encdec.data.shards import (
    Records,
    ShardedRows,
    decode_row,
    encode_row,
    open_directory,
    write_shard,
)
from encdec.errors import DataError
from encdec.storage import as_path, user_path, user_place

__all__ = [
    "DatasetCard",
    "Records",
    "Shard",
    "ShardedRows",
    "content_fingerprint",
    "decode_row",
    "encode_row",
    "open_directory",
    "open_records",
    "read_card",
    "token_dtype",
    "write_shard",
]


def open_records(directory: str | os.PathLike[str]) -> Records:
    """Open a records directory written by ``encdec prepare``, or a mixture of several.

    A mixture is "A=3,B=1" (rates), "A,B" (proportional to their rows) or "A,B;temperature=2"; it
    is a ``mixing.MixedRecords`` and reads as one directory does. What exists as a directory is one,
    and so is what names no second part.

    Raises DataError where the directory, its card or a shard is missing, or a shard's size is
    not what the card says.
    """
    text = str(directory)
    # Parts of a mixture are looked at one by one.
    text = (user_path if "," in text else user_place)("the records directory", text)
    if "," not in text or (not is_address(text) and pathlib.Path(text).exists()):
        return open_directory(text)
    names, rates, temperature = parse_mixture(text)
    if missing := [
        name for name in names if not as_path(user_place("a part of the mixture", name)).is_dir()
    ]:
        raise DataError(
            f"{text} is not a directory, and, read as a mixture (DIR=RATE,DIR=RATE), its part "
            f"{missing[0]} does not exist; give a directory written by encdec prepare, or several"
        )
    return cast(Records, mix_records(names, rates, temperature=temperature))
