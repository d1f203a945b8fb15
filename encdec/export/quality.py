"""Cost of quantization: an export compared with the float32 model, on real pairs of records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from encdec.data.records import decode_row, open_records
from encdec.errors import DataError
from encdec.inference.shapes import bucket
from encdec.model import ModelConfig, build_model


class ForcedModel(Protocol):
    """An exported model that gives its logits under teacher forcing."""

    def forced_logits(self, source: np.ndarray, target: np.ndarray, start_id: int) -> np.ndarray:
        """Logits [T, V] of every target token given those before it."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """An export compared with the float32 model: same target tokens, teacher forcing.

    Attributes:
        tokens: target tokens compared.
        loss: the export's, in nats per token.
        reference_loss: the float32 model's.
        agreement: share of positions where both have the same most likely token.
        largest_difference: largest absolute difference of two logits.
    """

    tokens: int
    loss: float
    reference_loss: float
    agreement: float
    largest_difference: float

    def __str__(self) -> str:
        change = self.loss / self.reference_loss - 1 if self.reference_loss else 0.0
        return (
            f"{self.tokens:,} target tokens: loss {self.loss:.4f} against "
            f"{self.reference_loss:.4f} in float32 ({change:+.2%}), the most likely token is the "
            f"same in {self.agreement:.2%}, logits at most {self.largest_difference:.2g} apart"
        )


def read_pairs(records: str, count: int, fingerprint: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first ``count`` (source, target) token pairs of a records directory.

    Raises:
        DataError: there are no records, none has a source and a target, or their vocabulary does
            not have the ``fingerprint``.
    """
    opened = open_records(records)
    if opened.card.vocabulary.fingerprint != fingerprint:
        raise DataError(
            f"{records} was made with another vocabulary than the model's; give "
            "records made with the model's vocabulary"
        )
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for row in range(len(opened)):
        if len(pairs) >= count:
            break
        sources, targets = decode_row(opened.read([row])[0], opened.card.token_dtype)
        pairs += [(s, t) for s, t in zip(sources, targets) if len(s) and len(t)]
    if not pairs:
        raise DataError(f"{records} has no row with a source and a target; give other records")
    return pairs[:count]


def measure(
    model: ForcedModel,
    config: ModelConfig,
    params: Any,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    start_id: int,
) -> Quality:
    """Compares the export with the model, pair by pair; ``params`` in any layout."""
    config = config.replace(dtype="float32", remat="none", attention_kernel="xla")
    apply = jax.jit(lambda params, batch: build_model(config).apply({"params": params}, batch))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    tokens, losses, same, apart = 0, np.zeros(2), 0, 0.0
    for source, target in pairs:
        theirs = model.forced_logits(source, target, start_id)
        ours = reference_logits(config, params, apply, source, target, start_id)
        for place, logits in enumerate((theirs, ours)):
            shifted = logits - logits.max(-1, keepdims=True)
            log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
            losses[place] -= log_probs[np.arange(len(target)), target].sum(dtype=np.float64)
        tokens += len(target)
        same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        apart = max(apart, float(np.abs(theirs - ours).max()))
    return Quality(tokens, losses[0] / tokens, losses[1] / tokens, same / tokens, apart)


def reference_logits(
    config: ModelConfig,
    params: Any,
    apply: Any,
    source: np.ndarray,
    target: np.ndarray,
    start_id: int,
) -> np.ndarray:
    """The same from our own model, in rows of few lengths."""
    prompt = [start_id] if config.is_encoder_decoder else [start_id, *source]
    rows = {"decoder": [*prompt, *target[:-1]]}
    if config.is_encoder_decoder:
        rows["encoder"] = list(source)
    batch = {}
    for side, ids in rows.items():
        width = bucket(len(ids))
        for name, values in (
            ("input_tokens", ids),
            ("segment_ids", [1] * len(ids)),
            ("positions", range(len(ids))),
        ):
            field = np.zeros((1, width), np.int32)
            field[0, : len(ids)] = values
            batch[f"{side}_{name}"] = field
    logits = np.asarray(apply(params, batch))[0]
    return logits[len(prompt) - 1 : len(prompt) - 1 + len(target)]
