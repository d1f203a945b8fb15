"""Answers to requests in the formats of OpenAI's protocols."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from encdec.data.vocabulary import Vocabulary
from encdec.inference.text_io import INCOMPLETE, PieceTexts
from encdec.serving.prompts import Prompt
from encdec.serving.protocol import Completion
from encdec.serving.tickets import TokenLogProbs, Update

LEAST_LOG_PROB = -9999.0  # JSON has no infinity; OpenAI's lowest value


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token as programs see it.

    Attributes:
        text: what it adds to the answer's text; empty for a token that ends the answer or begins
            a character that a later token completes.
        begin: where the text begins in the answer, in characters.
        data: its bytes.
        log_prob: the model's log-probability; None for tokens of the input.
        alternatives: the most likely tokens at its position by the text they would add, and their
            log-probabilities; tokens with the same text share the entry of the most likely one.
    """

    text: str
    begin: int
    data: bytes
    log_prob: float | None
    alternatives: dict[str, float]


class PieceCutter:
    """Splits a growing text into what each of its tokens adds.

    The pieces are slices of the text itself, so they always join to it.
    """

    def __init__(self, vocabulary: Vocabulary, context: Sequence[int] = ()):
        self._vocabulary, self._texts = vocabulary, PieceTexts(vocabulary, context)
        self._text, self._begin, self._end = "", 0, 0
        self._waiting: list[tuple[int, int, float | None, list[tuple[str, int, float]]]] = []

    def push(
        self,
        text: str,
        tokens: Sequence[int],
        log_probs: Sequence[float | None],
        likeliest: Sequence[Sequence[tuple[int, float]]] = (),
        *,
        last: bool,
    ) -> list[Piece]:
        """The pieces of tokens whose text is complete; with ``last``, of all that are left.

        Args:
            text: that the tokens add; it may lag behind them.
            tokens: new ones.
            log_probs: of the tokens; None where the model has none.
            likeliest: ids and log-probabilities at each token's place; empty if not asked for.
            last: whether the text ends here.
        """
        self._text += text
        for token, log_prob, others in zip(tokens, log_probs, likeliest or [[]] * len(tokens)):
            named = [(self._name(other), other, value) for other, value in others]
            self._end += len(self._texts.add(token))
            self._waiting.append((self._end, token, log_prob, named))
        if last:
            self._settle()
        ready = len(self._waiting) if last else self._ready()
        there, self._waiting = self._waiting[:ready], self._waiting[ready:]
        return [self._piece(*waiting) for waiting in there]

    def _ready(self) -> int:
        """Tokens whose text is complete. A token that adds no text waits for the next one that
        does: it may have begun that character; if none comes, the replacement character is its
        text."""
        ready, reached = 0, self._begin
        for place, (end, *_) in enumerate(self._waiting):
            if end > len(self._text):
                break
            if end > reached:
                ready, reached = place + 1, end
        return ready

    def _settle(self) -> None:
        """Gives the rest of the text to the last token that has any."""
        whole, eos = len(self._text), self._vocabulary.eos_id
        ends = [min(end, whole) for end, *_ in self._waiting]
        for place in reversed(range(len(ends))):
            if self._waiting[place][1] != eos:
                ends[place:] = [whole] * (len(ends) - place)
                break
        self._waiting = [
            (end, token, log_prob, named)
            for end, (_, token, log_prob, named) in zip(ends, self._waiting)
        ]

    def _piece(
        self, end: int, token: int, log_prob: float | None, named: list[tuple[str, int, float]]
    ) -> Piece:
        begin, self._begin = self._begin, max(end, self._begin)
        text = self._text[begin : self._begin]
        alternatives: dict[str, float] = {}
        if named and log_prob is not None:
            for name, other, value in [*named, (text, token, log_prob)]:
                name = text if other == token else name
                alternatives[name] = max(_rounded(value), alternatives.get(name, LEAST_LOG_PROB))
        data = self._vocabulary.token_bytes(token)
        rounded = None if log_prob is None else _rounded(log_prob)
        return Piece(text, begin, text.encode() if data is None else data, rounded, alternatives)

    def _name(self, token: int) -> str:
        """A token that was not chosen, with the text that it would have added."""
        if text := self._texts.of(token):
            return text
        data = self._vocabulary.token_bytes(token)
        if data is None:
            return self._vocabulary.piece(token)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _rounded(log_prob: float) -> float:
    return round(max(log_prob, LEAST_LOG_PROB), 6)


def echoed(vocabulary: Vocabulary, prompt: Prompt, known: TokenLogProbs | None) -> list[Piece]:
    """The tokens of a prompt.

    Args:
        vocabulary: the model's.
        prompt: its own tokens, EOS by its name.
        known: the last tokens of the prompt, which the model predicts; those before them have no
            probability, except EOS between input and answer, which has log-probability 0.
    """
    own, eos = prompt.own, vocabulary.eos_id
    known = known or TokenLogProbs([], [], [])
    missing = len(own) - len(known.tokens)
    log_probs: list[float | None] = [None] * missing
    likeliest: list[list[tuple[int, float]]] = [[] for _ in range(missing)]
    if missing and own[missing - 1] == eos:
        log_probs[-1], likeliest[-1] = 0.0, [(eos, 0.0)]
    log_probs += known.log_probs
    likeliest += known.likeliest or [[]] * len(known.tokens)
    pieces: list[Piece] = []
    offset, begin = 0, 0
    while begin < len(own):
        end = own.index(eos, begin) if eos in own[begin:] else len(own)
        text = vocabulary.decode(own[begin:end])
        if end == len(own) and prompt.context:
            text = text.rstrip(INCOMPLETE)  # the answer's first tokens may complete it
        part = own[begin:end], log_probs[begin:end], likeliest[begin:end]
        for piece in PieceCutter(vocabulary).push(text, *part, last=True):
            pieces.append(dataclasses.replace(piece, begin=offset + piece.begin))
        offset += len(text)
        if end < len(own):
            name = next(iter(vocabulary.special_tokens))
            value, others = log_probs[end], {}
            if value is not None:
                value = _rounded(value)
                others = {vocabulary.piece(token): _rounded(one) for token, one in likeliest[end]}
                others[name] = value
            pieces.append(Piece(name, offset, name.encode(), value, others))
            offset += len(name)
        begin = end + 1
    return pieces


class Shaper:
    """Answers of one request in OpenAI's formats, whole or streamed."""

    def __init__(self, model: str, vocabulary: Vocabulary, completion: Completion):
        self._vocabulary, self._completion = vocabulary, completion
        chat, stream = completion.is_chat, completion.stream
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if chat and stream else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._cutters: dict[int, PieceCutter] = {}
        self._offsets: dict[int, int] = {}
        self._shown: set[int] = set()

    def choice(self, update: Update) -> dict[str, Any] | None:
        """A choice, or its new part; None if it has no text to show yet."""
        completion, index = self._completion, update.index
        text, pieces = update.text, []
        prompt = completion.prompts[index // completion.samples]
        asked = completion.log_probs
        cut = lambda rows: [row[:asked] for row in rows]
        if index not in self._cutters:
            self._cutters[index] = PieceCutter(self._vocabulary, prompt.context)
            self._offsets[index] = 0
            if completion.echo:
                known = update.prompt
                if known:
                    known = dataclasses.replace(known, likeliest=cut(known.likeliest))
                pieces = echoed(self._vocabulary, prompt, known)
                echo = "".join(piece.text for piece in pieces)
                text, self._offsets[index] = echo + text, len(echo)
        if asked is not None:
            new = update.tokens, update.log_probs, cut(update.likeliest)
            pieces += [
                dataclasses.replace(piece, begin=piece.begin + self._offsets[index])
                for piece in self._cutters[index].push(
                    update.text, *new, last=update.finish is not None
                )
            ]
        if not (text or pieces or update.finish):
            return None
        first = index not in self._shown
        self._shown.add(index)
        reason = "length" if update.finish == "length" else "stop" if update.finish else None
        shape = self._chat_choice if completion.is_chat else self._text_choice
        return {"index": index} | shape(text, pieces, first) | {"finish_reason": reason}

    def _text_choice(self, text: str, pieces: Sequence[Piece], first: bool) -> dict[str, Any]:
        asked, kept = self._completion.log_probs, None
        if asked is not None:
            kept = {
                "tokens": [piece.text for piece in pieces],
                "token_logprobs": [piece.log_prob for piece in pieces],
                "top_logprobs": [piece.alternatives or None for piece in pieces] if asked else None,
                "text_offset": [piece.begin for piece in pieces],
            }
        return {"text": text, "logprobs": kept}

    def _chat_choice(self, text: str, pieces: Sequence[Piece], first: bool) -> dict[str, Any]:
        asked, kept = self._completion.log_probs, None
        if asked is not None:
            kept = {"content": [self._chat_piece(piece) for piece in pieces], "refusal": None}
        if not self._completion.stream:
            message = {"role": "assistant", "content": text, "refusal": None}
            return {"message": message, "logprobs": kept}
        delta = ({"role": "assistant"} if first else {}) | {"content": text}
        return {"delta": delta, "logprobs": kept}

    def _chat_piece(self, piece: Piece) -> dict[str, Any]:
        return {
            "token": piece.text,
            "logprob": piece.log_prob,
            "bytes": list(piece.data),
            "top_logprobs": [
                {
                    "token": name,
                    "logprob": value,
                    "bytes": list(piece.data if name == piece.text else _named_bytes(name)),
                }
                # Unlike in completions, the chosen token is there only if it is one of so many.
                for name, value in list(piece.alternatives.items())[: self._completion.log_probs]
            ],
        }

    def body(
        self, choices: Sequence[dict[str, Any]], output_tokens: int | None = None
    ) -> dict[str, Any]:
        """A response or, without token counts, a chunk of a stream."""
        body = self._head | {"choices": list(choices)}
        if output_tokens is not None:
            inputs = sum(len(prompt.ids) + len(prompt.begun) for prompt in self._completion.prompts)
            body["usage"] = {
                "prompt_tokens": inputs,
                "completion_tokens": output_tokens,
                "total_tokens": inputs + output_tokens,
            }
        elif self._completion.include_usage:
            body["usage"] = None
        return body


def _named_bytes(name: str) -> bytes:
    digits = name.removeprefix("bytes:\\x")
    return name.encode() if digits == name else bytes.fromhex(digits.replace("\\x", ""))


def best(updates: Sequence[Update], keep: int) -> list[Update]:
    """The whole answers to one prompt with the highest mean log-probability per token, best first;
    if all are kept, in the order in which they were made."""
    if keep == len(updates):
        return list(updates)
    mean = lambda update: sum(update.log_probs) / max(1, len(update.log_probs))
    return sorted(updates, key=mean, reverse=True)[:keep]
