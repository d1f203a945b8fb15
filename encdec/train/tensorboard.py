"""TensorBoard event files without TensorFlow, in the place where clu expects its writer.

``clu.metric_writers`` imports its ``summary_writer`` module eagerly, and that module imports
TensorFlow, for which a training host has no use (and which takes seconds and hundreds of
megabytes). The event format itself is plain: records framed by the tensorboard package, which
needs no TensorFlow for it. So this module defines the writer on top of that, registers itself
under clu's module name before clu is imported, and hands out clu's modules:

    from encdec.train.tensorboard import metric_writers, periodic_actions

Where clu's own writer has already been imported (a host that prepares data in the same process),
nothing is replaced.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from encdec import buckets
from encdec.buckets import is_address
from encdec.storage import as_path, make_directory

_CLU_MODULE = "clu.metric_writers.summary_writer"


SENT_BYTES = 4 << 20  # of an event file in a bucket, before the next one begins


class _SentFile(io.BytesIO):
    """A growing file in a bucket: objects do not grow, so it is sent again whole when flushed.

    Then it is known to be there; between flushes it is kept in memory.
    """

    def __init__(self, path: epath.Path):
        super().__init__()
        self._path, self._sent = path, 0

    def flush(self) -> None:
        content = self.getvalue()
        if len(content) > self._sent:
            buckets.write_bytes(self._path, content)
            self._sent = len(content)

    def close(self) -> None:
        if not self.closed:
            self.flush()
        super().close()


class SummaryWriter:
    """Writes scalars as TensorBoard events; other kinds are not used in training.

    Implements what clu's ``MetricWriter`` asks for; it cannot inherit from it, because clu's
    package is what is being imported when this class is needed.
    """

    def __init__(self, logdir: str, start_step: int | None = None):
        """Opens a new event file; ``start_step`` makes TensorBoard drop later steps written by
        an earlier process, which a resumed run repeats."""
        self._directory, self._files = as_path(logdir), 0
        make_directory(self._directory)
        self._open()
        if start_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(wall_time=time.time(), step=start_step, session_log=start))

    def _open(self) -> None:
        """A new event file, whose name sorts behind the earlier ones'."""
        more = f".{self._files}" if self._files else ""
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}{more}"
        path = self._directory / name
        self._file = _SentFile(path) if is_address(path) else path.open("wb")
        self._records = RecordWriter(self._file)
        self._files += 1
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        metadata = scalar_metadata.create_summary_metadata("", "")
        for key, value in scalars.items():
            tensor = tensor_pb2.TensorProto(
                dtype=types_pb2.DT_FLOAT,
                float_val=[float(np.asarray(value))],
                tensor_shape=tensor_shape_pb2.TensorShapeProto(),
            )
            summary = summary_pb2.Summary(
                value=[summary_pb2.Summary.Value(tag=key, tensor=tensor, metadata=metadata)]
            )
            self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def write_summaries(self, *arguments: Any, **more: Any) -> None:
        """Nothing but scalars is written here."""

    write_images = write_videos = write_audios = write_texts = write_summaries
    write_histograms = write_hparams = write_summaries

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: event_pb2.Event) -> None:
        if isinstance(self._file, _SentFile) and self._file.tell() > SENT_BYTES:
            self._file.close()
            self._open()
        self._records.write(event.SerializeToString())


sys.modules.setdefault(_CLU_MODULE, sys.modules[__name__])

from clu import metric_writers, periodic_actions  # noqa: E402

metric_writers.MetricWriter.register(SummaryWriter)

__all__ = ["SummaryWriter", "metric_writers", "periodic_actions"]
