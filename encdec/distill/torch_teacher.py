"""Teachers run by torch without conversion: Hugging Face models of families we do not import.

Every text is read by itself, padded on the right, so that any causal model of transformers is
right, whatever it does with positions or packing. From the logits on, everything is as for a model
of ours: the same draws from the same keys.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from encdec import safetensors
from encdec.data.input_prefix import with_prefix
from encdec.data.records import Records, decode_row
from encdec.data.sparse_logits import SparseFormat
from encdec.data.tokenizer_files import tokens_around
from encdec.data.vocabulary import Vocabulary, load_vocabulary, vocabulary_file
from encdec.distill.draw import Kept, keep
from encdec.distill.teachers import check_longest, check_records
from encdec.errors import ConfigError, DataError
from encdec.files import file_sha256
from encdec.packages import install_hint
from encdec.pretrained import LOCAL, load_causal_model, why_unread
from encdec.storage import as_path, directory_name, on_this_machine

BATCH_ROWS = 8
BATCH_TOKENS = 4096  # padded, in one forward pass: its logits are in memory whole
HEAD_TOKENS = 256  # target positions reduced to what is kept at once


@dataclasses.dataclass(frozen=True)
class TorchModel:
    """A Hugging Face directory that fits the records; its parameters are not loaded yet.

    Attributes:
        directory: holds config.json and *.safetensors.
        identity: name, parameters and a fingerprint, for the card.
        start_id: the id before the first token of a text: BOS, else EOS.
        inputs_prefix: what else its tokenizer puts in front of a text.
    """

    directory: pathlib.Path
    identity: dict[str, Any]
    start_id: int
    inputs_prefix: tuple[int, ...] = ()

    def forward_flops(self, records: Records) -> float:
        """Of one pass over all tokens: twice the parameters for each; attention is left out."""
        card = records.card
        return 2.0 * self.identity["parameters"] * (card.source_tokens + card.target_tokens)


def torch_model(
    directory: str | os.PathLike[str],
    records: Records,
    vocabulary: str | os.PathLike[str] | Vocabulary | None = None,
    max_length: int | None = None,
) -> TorchModel:
    """The teacher, if it can read these records.

    Args:
        directory: of a Hugging Face causal language model.
        records: that it will read.
        vocabulary: the model's; by default the tokenizer.model or tokenizer.json next to it.
        max_length: tokens that it may read at once, by default what its configuration says.

    Raises:
        ConfigError: torch or transformers is missing, or the records are a mixture.
        DataError: no model there, another vocabulary, or texts too long for it.
    """
    if not (as_path(directory) / "config.json").is_file():
        raise DataError(
            f"{directory} has no config.json; give the directory of a Hugging Face "
            "causal language model (config.json and *.safetensors)"
        )
    directory = on_this_machine(directory)
    transformers = _transformers()
    tensors = safetensors.open_directory(directory)
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **LOCAL)
    except Exception as error:  # whatever transformers makes of the file
        raise DataError(
            f"transformers {transformers.__version__} cannot read {directory}: {why_unread(error)}"
        ) from error
    file = vocabulary if vocabulary is not None else vocabulary_file(directory)
    if file is None:
        raise DataError(
            f"{directory} holds neither tokenizer.model nor tokenizer.json; give the "
            "model's vocabulary with --vocabulary=FILE"
        )
    spec = load_vocabulary(file).spec()
    check_records(records, directory, spec, str(file))
    text = config.get_text_config()
    if text.vocab_size < spec.size:
        raise DataError(
            f"the vocabulary {file} has {spec.size:,} ids, the model only "
            f"{text.vocab_size:,}; give the model's own with --vocabulary=FILE"
        )
    longest = max_length or getattr(text, "max_position_embeddings", None)
    if longest:
        check_longest(records, longest, directory)
    starts = (text.bos_token_id, text.eos_token_id, spec.eos_id)
    start = next(token for token in starts if isinstance(token, int))
    start, *prefix = tokens_around(directory)[0] or [start]
    return TorchModel(
        directory,
        {
            "name": directory_name(directory),
            "step": 0,
            "fingerprint": _fingerprint(directory),
            "architecture": ", ".join(config.architectures or ["unknown"]) + " in torch",
            "parameters": sum(int(tensor.size) for tensor in tensors.values()),
        },
        start,
        tuple(prefix),
    )


def _transformers() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"--backend=torch needs torch and transformers ({error}): {install_hint('hf')}"
        ) from error
    return transformers


def _fingerprint(directory: pathlib.Path) -> str:
    """sha256 over configuration and weights."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    content = [(file.name, file_sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class TorchBackend:
    """A ``TorchModel`` as a ``TeacherBackend``: on the GPU that torch sees, otherwise on the CPU.

    Each process reads rows of its own with a whole model.
    """

    def __init__(
        self, model: TorchModel, records: Records, fmt: SparseFormat, *, seed: int, batch_rows: int
    ):
        self.host, self.hosts, self.writes = jax.process_index(), jax.process_count(), True
        self.batch_rows = batch_rows or BATCH_ROWS * self.hosts
        if self.batch_rows % self.hosts:
            raise ConfigError(
                f"--batch_rows is {batch_rows}; expected a multiple of the {self.hosts} processes"
            )
        self._teacher, self._records, self._fmt = model, records, fmt
        # Where torch computes, not where jax would put arrays by default.
        self._keep = jax.jit(functools.partial(_keep, seed=seed, fmt=fmt), backend="cpu")
        self._model: Any = None

    def load(self) -> None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_causal_model(self._teacher.directory, dtype="auto").eval().to(device)

    def forward(self, numbers: np.ndarray) -> Kept:
        card = self._records.card
        sources, targets, rows, starts = self._texts(numbers)
        kept: dict[str, np.ndarray] = {}
        for group in _by_length([len(s) + len(t) for s, t in zip(sources, targets)]):
            logits = self._logits([sources[i] for i in group], [targets[i] for i in group])
            row = np.concatenate([np.full(len(targets[i]), rows[i]) for i in group])
            place = np.concatenate([starts[i] + np.arange(len(targets[i])) for i in group])
            for first in range(0, len(row), HEAD_TOKENS):
                part = slice(first, first + HEAD_TOKENS)
                found = self._reduced(logits[part], numbers[row[part]], place[part])
                for name, values in found.items():
                    whole = kept.setdefault(
                        name,
                        np.zeros(
                            (len(numbers), card.targets_length, *values.shape[1:]), values.dtype
                        ),
                    )
                    whole[row[part], place[part]] = values
        tokens = np.zeros(len(numbers), np.int32)
        np.add.at(tokens, rows, [len(t) for t in targets])
        return kept | {"tokens": tokens}

    def fetch(self, kept: Kept) -> dict[str, np.ndarray]:
        return {name: np.asarray(values) for name, values in kept.items()}

    def _texts(
        self, numbers: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
        """All segments of the rows: sources, targets, the row's place in the batch, and the place
        of the first target among the row's."""
        sources, targets, rows, starts = [], [], [], []
        prefixes = self._records.card.inputs_prefix, self._teacher.inputs_prefix
        real = np.flatnonzero(numbers >= 0)
        for index, data in zip(real, self._records.read(numbers[real])):
            row_sources, row_targets = decode_row(data, self._records.card.token_dtype)
            lengths = [len(target) for target in row_targets]
            sources += [with_prefix(source, *prefixes) for source in row_sources]
            targets += row_targets
            rows += [index] * len(lengths)
            starts += np.cumsum([0, *lengths[:-1]]).tolist()
        return sources, targets, np.array(rows, np.int64), np.array(starts, np.int64)

    def _logits(self, sources: list[np.ndarray], targets: list[np.ndarray]) -> np.ndarray:
        """float32 [all target tokens, V], text after text."""
        import torch

        texts = [
            np.concatenate([[self._teacher.start_id], s, t[:-1]]).astype(np.int64)
            for s, t in zip(sources, targets)
        ]
        width = max(map(len, texts))
        ids, mask = np.zeros((2, len(texts), width), np.int64)
        for index, text in enumerate(texts):
            ids[index, : len(text)], mask[index, : len(text)] = text, 1
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.tensor(ids, device=device),
                use_cache=False,
                attention_mask=torch.tensor(mask, device=device),
            ).logits
            picked = [
                logits[index, len(s) : len(s) + len(t), : self._fmt.vocab_size]
                for index, (s, t) in enumerate(zip(sources, targets))
            ]
            return torch.cat(picked).float().cpu().numpy()

    def _reduced(
        self, logits: np.ndarray, numbers: np.ndarray, places: np.ndarray
    ) -> dict[str, np.ndarray]:
        """``keep`` of some tokens, filled up to one shape so that it is compiled once."""
        count = len(logits)
        fill = lambda x, dtype: np.pad(
            x, ((0, HEAD_TOKENS - count),) + ((0, 0),) * (x.ndim - 1)
        ).astype(dtype)
        kept = self._keep(
            fill(logits, np.float32), fill(numbers, np.uint32), fill(places, np.uint32)
        )
        return {name: np.asarray(x)[:count] for name, x in kept.items()}


def _keep(
    logits_NxV: jax.Array,
    numbers_N: jax.Array,
    places_N: jax.Array,
    *,
    seed: int,
    fmt: SparseFormat,
) -> Kept:
    """As ``encdec.distill.teachers.make_logits_step`` keys its draws: by row, then by place."""
    key = jax.random.key(seed)
    keys_N = jax.vmap(lambda row, place: jax.random.fold_in(jax.random.fold_in(key, row), place))(
        numbers_N, places_N
    )
    return keep(logits_NxV, keys_N, fmt)


def _by_length(lengths: list[int]) -> list[list[int]]:
    """Texts of similar length together, in groups of at most BATCH_TOKENS with their padding."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and lengths[index] * (len(groups[-1]) + 1) <= BATCH_TOKENS:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
