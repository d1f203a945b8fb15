"""Drafts for the slots of a running batch: copied from their inputs, or by a small model.

A draft model reads an input when tokens are first drafted for its slot: while plain steps are
faster, it costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from encdec.inference.decoding import Decoding, Memory
from encdec.inference.drafting import DraftModel
from encdec.inference.drafts import LookupTexts
from encdec.inference.shapes import bucket
from encdec.inference.speculation import Drafting, speculate_compiled
from encdec.model import ModelConfig, Params
from encdec.serving.slots import (
    SlotPlan,
    empty_memory,
    insert_for_drafts_compiled,
    read_compiled,
    slot_bytes,
)


class SlotDrafts:
    """What drafts are made of, of every slot.

    Args:
        config: the model that is drafted for, ready for decoding.
        params: its parameters.
        plan: the batch's.
        prefix: tokens with which every input begins, which are no text.
        model: what drafts; None: tokens are looked up in the inputs and answers.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        plan: SlotPlan,
        prefix: int,
        model: DraftModel | None = None,
    ):
        self._config, self._params, self._plan, self._prefix = config, params, plan, prefix
        self._model = model
        # Inputs that the draft model has not read yet, by slot.
        self._unread: dict[int, Sequence[int]] = {}
        self._last: tuple[Sequence[int], Memory] | None = None  # the input read last
        self._drafting: Drafting | None = None  # None: to be made of the texts
        self.texts: LookupTexts | None = None  # that are looked up in
        if model is None:
            shape = (plan.slots, plan.longest_input)
            self.texts = LookupTexts(np.zeros(shape, np.int32), np.zeros(plan.slots, np.int32))
            return
        decoding = dataclasses.replace(plan.decoding, start_id=model.start_id)
        self._model_plan = dataclasses.replace(plan, decoding=decoding)
        self._drafting = Drafting(
            memory=empty_memory(model.config, self._model_plan, model.params),
            fed_R=jnp.zeros(plan.slots, jnp.int32),
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot's keys and values in the draft model."""
        return slot_bytes(self._model.config, self._model_plan) if self._model else 0

    def put(self, slot: int, ids: Sequence[int]) -> None:
        """Takes note of a slot's new input."""
        if self.texts is None:
            self._unread[slot] = ids
            return
        text = ids[self._prefix :]
        self.texts.tokens_RxS[slot, : len(text)] = text
        self.texts.lengths_R[slot] = len(text)
        self._drafting = None

    def verify(self, decoding: Decoding, size: int, steps: int) -> tuple[Decoding, int, np.ndarray]:
        """So many verifying steps of a size, as ``Answering`` wants them."""
        if self._unread:
            finished_R = np.asarray(decoding.finished_R)
            for slot, ids in self._unread.items():
                if not finished_R[slot]:  # otherwise nobody waits for it any more
                    self._read(slot, ids)
            self._unread.clear()
        if self._drafting is None:
            self._drafting = Drafting(jax.tree.map(jnp.array, self.texts))
        model = self._model
        decoding, self._drafting, tally = speculate_compiled(
            self._config,
            self._plan.decoding,
            size,
            model.config if model else None,
            self._params,
            model.params if model else None,
            decoding,
            self._drafting,
            np.int32(steps),
        )
        return decoding, int(tally.steps), np.asarray(tally.made_K)

    def _read(self, slot: int, ids: Sequence[int]) -> None:
        """Has the draft model read an input; once for all answers to it that follow each other."""
        assert self._model is not None and self._drafting is not None
        if self._last is None or self._last[0] is not ids:
            width = min(bucket(len(ids)), self._plan.longest_input)
            tokens_1xS = np.zeros((1, width), np.int32)
            tokens_1xS[0, : len(ids)] = ids
            read = read_compiled(
                self._model.config,
                self._model_plan,
                self._model.params,
                tokens_1xS,
                np.int32(len(ids)),
            )
            self._last = ids, read.memory
        self._drafting = insert_for_drafts_compiled(self._drafting, np.int32(slot), self._last[1])

    def warm_up(self, decoding: Decoding, widths: Iterable[int], sizes: Iterable[int]) -> Decoding:
        """Runs every program of drafts once, while all slots are free."""
        for width in widths if self._model else ():
            self._read(0, [0] * width)
        for size in sizes:
            decoding, _, _ = self.verify(decoding, size, 0)
        return decoding
