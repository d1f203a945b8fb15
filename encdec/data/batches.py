"""Batches addressed by step: a pure function of (records, seed, step, global batch).

Position p of the endless stream of rows belongs to epoch p // rows; ``shuffle`` permutes each epoch
with a seed of its own, without state, so any step is reached at once and no row repeats within an
epoch. Hosts take contiguous slices of the same global batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from encdec.data.features import LAYOUTS
from encdec.data.records import Records
from encdec.data.shuffle import shuffled_rows
from encdec.errors import ConfigError

PREFETCH = 4
READ_THREADS = 2


class RowFields(Protocol):
    """Something known of every row, by row number."""

    def fields(self, row_numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Batch fields with one entry per row; -1 stands for an empty row."""


class Batches:
    """``batches[step]``: this host's slice of the global batch of a step, as numpy fields.

    layout "encoder_decoder": the eight fields, [global_batch // host_count, S or T].
    layout "decoder_only": the five decoder fields over S + T, from the same rows.
    repeat=False: one epoch of all rows, ``len(batches)`` steps, the last batch filled up with
    empty rows (segment ids and loss weights 0), for evaluation.

    columns: what else is known of each row, such as a teacher's distributions; each adds what its
    ``fields(row_numbers)`` returns (-1 for an empty row).

    Raises ConfigError where the batch does not divide over the hosts or a value is out of range.
    """

    def __init__(
        self,
        records: Records,
        *,
        global_batch: int,
        seed: int = 0,
        layout: str = "encoder_decoder",
        shuffle: bool = True,
        repeat: bool = True,
        host_index: int = 0,
        host_count: int = 1,
        columns: Sequence[RowFields] = (),
    ):
        if layout not in LAYOUTS:
            raise ConfigError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
        if global_batch < 1:
            raise ConfigError(f"the global batch is {global_batch}; expected 1 or more")
        if global_batch % host_count:
            raise ConfigError(
                f"a global batch of {global_batch} is not divisible by {host_count} hosts; choose "
                f"a multiple of {host_count}"
            )
        if not 0 <= host_index < host_count:
            raise ConfigError(f"host index {host_index} is outside 0..{host_count - 1}")
        if layout == "encoder_decoder" and getattr(records, "card", None):
            if records.card.inputs_length == 0:
                raise ConfigError(
                    f"the records hold {records.card.objective['name']} without sources; train a "
                    "decoder-only model on them, or prepare with another objective"
                )
        if not repeat and not getattr(records, "by_rows", True):
            raise ConfigError(
                "the rates of a mixture have no effect when every row is read once; leave them out "
                "(DIR,DIR), or evaluate the parts separately"
            )
        self.records = records
        self.global_batch = global_batch
        self.seed = seed
        self.layout = layout
        self.shuffle = shuffle
        self.repeat = repeat
        self.host_index = host_index
        self.host_count = host_count
        self.columns = tuple(columns)

    def __len__(self) -> int:
        """Steps: of one epoch without repeat, unbounded with it."""
        return sys.maxsize if self.repeat else self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps that touch every row at least once, counted from step 0."""
        return -(-len(self.records) // self.global_batch)

    def row_numbers(self, step: int) -> np.ndarray:
        """Row numbers of this host's slice of ``step``, int64; -1 for an empty row."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is outside 0..{len(self) - 1}")
        size = self.global_batch // self.host_count
        first = step * self.global_batch + self.host_index * size
        positions = np.arange(first, first + size)
        rows = len(self.records)
        if not self.repeat:
            order = np.minimum(positions, rows - 1)
            found = shuffled_rows(order, rows, self.seed) if self.shuffle else order
            return np.where(positions < rows, found, -1)
        if hasattr(self.records, "rows_at"):
            return self.records.rows_at(positions, self.seed, self.shuffle)
        return shuffled_rows(positions, rows, self.seed) if self.shuffle else positions % rows

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.read_rows(self.row_numbers(step))

    def read_rows(self, row_numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of any rows by number, in this layout; -1 gives an empty row."""
        numbers = np.asarray(row_numbers, np.int64)
        real = numbers >= 0
        stored = iter(self.records.read(numbers[real]))
        rows = [next(stored) if present else b"" for present in real]
        card = self.records.card
        fields = LAYOUTS[self.layout](
            rows,
            inputs_length=card.inputs_length,
            targets_length=card.targets_length,
            dtype=card.token_dtype,
            start_id=card.decoder_start_id,
        )
        for column in self.columns:
            fields |= column.fields(numbers)
        return fields

    def iterate(
        self, start_step: int = 0, stop_step: int | None = None, *, prefetch: int = PREFETCH
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of start_step, start_step + 1, ... read ahead by background threads.

        Errors of reading are raised at the step they belong to. ``prefetch`` batches are held.
        """
        import grain

        stop = len(self) if stop_step is None else min(stop_step, len(self))
        if start_step >= stop:
            return iter(())
        steps = _Steps(self, start_step, stop)
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=prefetch)
        return iter(grain.MapDataset.source(steps).to_iter_dataset(options))


class _Steps:
    """A range of steps as grain's random-access source."""

    def __init__(self, batches: Batches, start: int, stop: int):
        self._batches, self._start, self._stop = batches, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._batches[self._start + index]

    def __repr__(self) -> str:
        return f"batches {self._start}..{self._stop - 1}"
