"""Drafts of the next tokens, copied from the source and from the answer so far.

The last tokens of an answer are looked up in both, n of them, n from ``LONGEST`` down to 1; what
followed them there is the draft (prompt lookup decoding, https://github.com/apoorvumang/
prompt-lookup-decoding, here with an encoder's source). The functions take NumPy's arrays as well as
JAX's: the same rule drafts on the device and tells on the host what drafting would have given.
"""

from __future__ import annotations

from typing import Any

import flax
import jax.numpy as jnp
import numpy as np

from encdec.inference.sampling import first_highest

LONGEST = 4  # tokens looked up
# Stands for no token: the place before a text's first, before an answer's first, and behind a text.
_BEGIN, _BEFORE, NOTHING = -2, -3, -1


class LookupTexts(flax.struct.PyTreeNode):
    """The texts of which answers are made.

    Attributes:
        tokens_RxS: int32.
        lengths_R: int32, how many of them are text.
    """

    tokens_RxS: Any
    lengths_R: Any


def look_up(
    sources: LookupTexts, answers_RxN: Any, counts_R: Any, eos_R: Any, length: int, xp: Any = jnp
) -> Any:
    """What may follow each answer, int32 [R, length]; ``NOTHING`` where no draft is found.

    The longest match wins; of matches of one length that nearest to the answer's own place in the
    source, then the last one in the answer. A source is drafted to its end and an EOS behind it,
    and the continuation of an answer that repeats itself.

    Args:
        sources: the texts.
        answers_RxN: int32, the answers.
        counts_R: int32, how many tokens of them there are.
        eos_R: int32, the token that ends an answer.
        length: tokens to draft.
        xp: ``jax.numpy`` or ``numpy``.
    """
    tokens_RxS, lengths = sources.tokens_RxS, sources.lengths_R[:, None]
    (rows, width), capacity = tokens_RxS.shape, answers_RxN.shape[1]
    counts, eos = counts_R[:, None], eos_R[:, None]
    places_S, places_N = xp.arange(width + 1), xp.arange(capacity)
    begin_Rx1 = xp.full((rows, 1), _BEGIN, xp.int32)
    padded_RxS = xp.concatenate([tokens_RxS, begin_Rx1], axis=1)
    source_RxS = xp.where(
        places_S < lengths, padded_RxS, xp.where(places_S == lengths, eos, NOTHING)
    )
    answer_RxN = xp.where(places_N < counts, answers_RxN, NOTHING)
    # Both texts, each behind a token that stands for its beginning.
    text_RxP = xp.concatenate([begin_Rx1, source_RxS, begin_Rx1, answer_RxN], axis=1)
    matched_RxP, holds_RxP = xp.zeros(text_RxP.shape, xp.int32), text_RxP >= 0
    for back in range(1, LONGEST + 1):
        last = xp.take_along_axis(answers_RxN, xp.maximum(counts - back, 0), axis=1)
        last = xp.where(counts >= back, last, xp.where(counts == back - 1, _BEGIN, _BEFORE))
        holds_RxP = holds_RxP & (xp.roll(text_RxP, back, axis=1) == last)
        matched_RxP = matched_RxP + holds_RxP
    places_P = xp.arange(text_RxP.shape[1])
    answer_begin = width + 3  # the answer's first place in the text
    in_source_P = places_P < answer_begin - 1
    far_RxP = xp.where(
        in_source_P, xp.abs(places_P - 1 - counts), width + 2 * capacity - places_P + answer_begin
    )
    worth_RxP = matched_RxP * (4 * (width + capacity)) - far_RxP
    best = first_highest(worth_RxP, xp)[:, None]
    found = xp.take_along_axis(matched_RxP, best, axis=1) > 0
    steps_D = xp.arange(length)
    # An answer has nothing behind its end: what it repeats is repeated again.
    period = xp.maximum(answer_begin + counts - best, 1)
    wanted_RxD = best + xp.where(best < answer_begin, steps_D, steps_D % period)
    drafts_RxD = xp.take_along_axis(text_RxP, xp.minimum(wanted_RxD, text_RxP.shape[1] - 1), axis=1)
    beyond_RxD = (best < answer_begin) & (wanted_RxD >= answer_begin)
    kept_RxD = found & (drafts_RxD >= 0) & ~beyond_RxD
    return xp.where(kept_RxD, drafts_RxD, NOTHING).astype(xp.int32)


def hindsight(
    sources: LookupTexts,
    answers_RxN: np.ndarray,
    counts_R: np.ndarray,
    eos_R: np.ndarray,
    length: int,
    most: int = 24,
) -> np.ndarray | None:
    """How often the first j tokens of a draft would have been right, float64 [length + 1] by j.

    Told from the last tokens of the answers, at ``most`` places in all, on the host and without a
    compiled program; None where there are too few. For a j that no answer is long enough to tell,
    what the j before it says holds.
    """
    rows = np.flatnonzero(counts_R > 1)[:most]
    if not len(rows):
        return None
    each = max(length, most // len(rows))
    pairs = [
        (row, place) for row in rows for place in range(max(1, counts_R[row] - each), counts_R[row])
    ]
    pairs = pairs[:: max(1, len(pairs) // most)]
    row_Q, place_Q = (np.array(x, np.int32) for x in zip(*pairs))
    # Without what is padding in all of them: this runs between two steps.
    tokens_QxN = answers_RxN[row_Q, : counts_R[rows].max()]
    lengths_Q = np.asarray(sources.lengths_R)[row_Q]
    then = LookupTexts(np.asarray(sources.tokens_RxS)[row_Q, : lengths_Q.max()], lengths_Q)
    drafts_QxD = look_up(then, tokens_QxN, place_Q, eos_R[row_Q], length, np)
    places_QxD = place_Q[:, None] + np.arange(length)
    made_QxD = places_QxD < counts_R[row_Q][:, None]
    real_QxD = np.take_along_axis(
        tokens_QxN, np.minimum(places_QxD, tokens_QxN.shape[1] - 1), axis=1
    )
    right_QxD = np.logical_and.accumulate(made_QxD & (drafts_QxD == real_QxD), axis=1)
    right_D, made_D = right_QxD.sum(axis=0), made_QxD.sum(axis=0)
    shares = [1.0]
    for right, made in zip(right_D, made_D):
        shares.append(min(shares[-1], right / made) if made else shares[-1])
    return np.array(shares)
