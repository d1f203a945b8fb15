"""Safetensors files, read in place and written tensor by tensor.

The format is eight bytes with the header's length (little endian), the header as JSON (name to
dtype, shape and place), then the data: https://huggingface.co/docs/safetensors. Tensors are read
as views of the mapped file and written one at a time, so that host memory stays free however
large the model; the library of that name copies whole files and needs torch for bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from encdec.errors import DataError
from encdec.files import whole_file

_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "BOOL": np.dtype(bool),
}
INDEX_FILE = "model.safetensors.index.json"


def open_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read-only views of all tensors of one file.

    Raises:
        DataError: the file is cut short or is not what its header says.
    """
    remedy = "download it again"
    size = path.stat().st_size
    if size < 8:
        raise DataError(f"{path} has {size} bytes, too few for a safetensors file; {remedy}")
    data = np.memmap(path, np.uint8, mode="r")
    start = 8 + int(data[:8].view("<u8")[0])
    if start > size:
        raise DataError(
            f"{path} is truncated: its header ends at byte {start:,} of {size:,}; {remedy}"
        )
    try:
        header = json.loads(data[8:start].tobytes())
    except ValueError as error:
        raise DataError(f"{path} has an unreadable header ({error}); {remedy}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise DataError(
                f"tensor {name} in {path} has dtype {entry['dtype']}; expected one of "
                f"{', '.join(_DTYPES)}: use an unquantized checkpoint"
            )
        first, last = (start + offset for offset in entry["data_offsets"])
        if last > size or last - first != int(np.prod(entry["shape"])) * dtype.itemsize:
            raise DataError(
                f"{path} is truncated or damaged: tensor {name} ends at byte {last:,} of {size:,}; "
                f"{remedy}"
            )
        tensors[name] = data[first:last].view(dtype).reshape(entry["shape"])
    return tensors


def open_directory(directory: pathlib.Path) -> Mapping[str, np.ndarray]:
    """Views of all tensors of a checkpoint in one or several files.

    As in transformers, a file for all counts before an index.

    Raises:
        DataError: no safetensors files, one that its index names is missing, or two files have the
            same tensor.
    """
    index, single = directory / INDEX_FILE, directory / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise DataError(
                f"{directory} lacks {', '.join(missing)}, which {INDEX_FILE} names; download them"
            )
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DataError(
            f"{directory} holds no *.safetensors file; give a directory downloaded "
            "from Hugging Face in that format (not *.bin or *.gguf)"
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        more = open_file(file)
        if twice := sorted(tensors.keys() & more.keys()):
            raise DataError(
                f"{file} has tensor {twice[0]}, as has another file in {directory}; keep the files "
                "of one checkpoint alone"
            )
        tensors |= more
    return tensors


def write_directory(
    directory: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    file_bytes: int = 4 << 30,
    *,
    stem: str = "params",
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Writes tensors to files of about ``file_bytes``, holding one tensor in memory at a time.

    Any view will do: transposed ones are laid out afresh as they are written. ``stem`` begins the
    files' names; ``metadata`` goes into their headers.

    Returns:
        The files' names and SHA-256 checksums. A file bears its name only once it is whole.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for number, group in enumerate(groups):
        path = directory / f"{stem}-{number:05}-of-{len(groups):05}.safetensors"
        written[path.name] = _write_file(path, {name: tensors[name] for name in group}, metadata)
    return written


def _write_file(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None
) -> str:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    digest = hashlib.sha256()
    with whole_file(path) as partial, open(partial, "wb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for tensor in tensors.values():
            put(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
