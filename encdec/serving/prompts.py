"""Prompts of requests as the model reads them, and which of their tokens it predicts.

A prompt may contain an EOS token: the part before the last EOS is the model's input, and the part
after it is the beginning of the answer, which the model continues. Clients that only know
completions (evaluation harnesses send context and continuation as one prompt) use it to tell an
encoder-decoder where the input ends and the answer begins. In token ids it is an id; in texts that
are echoed, its name is read as EOS, as in tokenizers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from encdec.errors import DataError
from encdec.inference.text_io import PromptFormat, after_eos, check_text


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: what the model reads as its input, framing included.
        begun: tokens with which the decoder's answer already begins.
        own: the prompt's own tokens, without framing, as an echo shows them.
        context: the end of ``own`` that the answer's text continues.
        before: tokens of framing that come before ``own`` in ``ids``.
    """

    ids: list[int]
    begun: list[int] = dataclasses.field(default_factory=list)
    own: list[int] = dataclasses.field(default_factory=list)
    context: list[int] = dataclasses.field(default_factory=list)
    before: int = 0


@dataclasses.dataclass(frozen=True)
class PromptReader:
    """Makes prompts from texts and tokens.

    Attributes:
        format: of the model's inputs.
        is_encoder_decoder: the model's architecture.
    """

    format: PromptFormat
    is_encoder_decoder: bool

    def read(
        self, part: str | Sequence[int], *, marked: bool, truncate: bool = False, name: str
    ) -> Prompt:
        """The prompt for a text or for tokens.

        Args:
            part: the text or its tokens.
            marked: names of special tokens in a text are read as these tokens.
            truncate: cut the end of a long input.
            name: of the prompt, for error messages.

        Raises:
            DataError: it is empty, too long, or not covered by the vocabulary.
        """
        form, vocabulary = self.format, self.format.vocabulary
        if not isinstance(part, str):
            return self._of_tokens(list(part), truncate, name)
        if marked and any(special in part for special in vocabulary.special_tokens):
            check_text(part, name)
            source, end, begun = part.rpartition(next(iter(vocabulary.special_tokens)))
            if not (end and self._eos_divides):
                source, end, begun = part, "", ""
            text = f"{form.framed(source)}{end}{begun}"
            ids = vocabulary.encode_marked(text)
            form.check_known(ids, text, name, marked=True)
            return self._of_tokens(ids, truncate, name)
        return self._undivided(form.encode(part, truncate=truncate, name=name)[0])

    @property
    def _eos_divides(self) -> bool:
        """Whether EOS is between input and answer; otherwise a decoder-only model continues the
        same text."""
        return self.is_encoder_decoder or self.format.inputs_eos

    def _undivided(self, ids: list[int]) -> Prompt:
        """A framed input without a beginning of the answer."""
        before = len(self.format.inputs_prefix)
        own = ids[before : len(ids) - self.format.inputs_eos]
        context = [] if self._eos_divides else after_eos(own, self.format.vocabulary.eos_id)
        return Prompt(ids, own=own, context=context, before=before)

    def _of_tokens(self, own: list[int], truncate: bool, name: str) -> Prompt:
        """The prompt for tokens; the module's docstring explains EOS among them."""
        form, eos = self.format, self.format.vocabulary.eos_id
        place = len(own) - 1 - own[::-1].index(eos) if eos in own else None
        if place is None or not self._eos_divides:
            return self._undivided(form.fit(own, truncate=truncate, name=name)[0])
        form.check_tokens(own, name)
        source, begun, before = own[:place], own[place + 1 :], len(form.inputs_prefix)
        if not self.is_encoder_decoder and begun:
            # One row of tokens: the input, its EOS and the answer so far, so no EOS is added.
            ids, _ = dataclasses.replace(form, inputs_eos=False).fit(own, name=name)
            return Prompt(ids, own=own, context=begun, before=before)
        if source:
            ids, _ = form.fit(source, truncate=truncate, name=name)
        else:
            ids = [*form.inputs_prefix, *[eos] * form.inputs_eos]
        if not ids:
            raise DataError(f"{name} has no tokens before its EOS; give at least one")
        source = ids[before : len(ids) - form.inputs_eos]
        return Prompt(ids, begun, [*source, eos, *begun], begun, before)
