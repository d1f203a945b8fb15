"""Which id an export pads with: readers derive masks from it, so it must mean nothing else.

Our start token is 0, as T5's is, and so is our padding. transformers takes every token that equals
``pad_token_id`` for padding: T5Gemma's decoder where it has neither a mask nor a cache, a Llama's
``generate`` where it has no mask. ``Trainer`` copies the tokenizer's id into the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from encdec.data.huggingface_vocabulary import BYTE_PIECE
from encdec.data.vocabulary import ByteVocabulary, Vocabulary

PADDING_TOKEN = "<|padding|>"  # of a row behind the vocabulary
_UNUSED = re.compile(r"pad|unused|reserved", re.IGNORECASE)


def padding_id(
    vocabulary: Vocabulary,
    rows: int,
    start_id: int,
    inputs_prefix: Sequence[int] = (),
    *,
    is_encoder_decoder: bool,
) -> int:
    """The first of these ids that is neither the start token nor EOS, nor in front of inputs:

    1. what pads here, where no text is written with it;
    2. a control piece that is named as padding, unused or reserved;
    3. the unknown token of a vocabulary that writes every text as bytes;
    4. the row behind the vocabulary, where the model's table has one;
    5. the unknown token; for encoder-decoders EOS, which no decoder reads before its answer ends.

    EOS is the last resort.

    Args:
        vocabulary: the model's.
        rows: of the model's embeddings.
        start_id: the decoder's first input.
        inputs_prefix: ids in front of every input.
        is_encoder_decoder: of the model's architecture.
    """
    unknown = 2 if isinstance(vocabulary, ByteVocabulary) else vocabulary.unk_id
    unwritten = [i for i in range(vocabulary.base_size) if vocabulary.byte_lengths[i] == 0]
    pieces = [vocabulary.piece(i) for i in range(vocabulary.base_size)]
    candidates = [vocabulary.pad_id] if vocabulary.pad_id in (*unwritten, unknown) else []
    candidates += [i for i in unwritten if _UNUSED.search(pieces[i])]
    spelled = sum(BYTE_PIECE.fullmatch(piece) is not None for piece in pieces)
    if unknown is not None and (isinstance(vocabulary, ByteVocabulary) or spelled == 256):
        candidates.append(unknown)
    if vocabulary.size < rows:
        candidates.append(vocabulary.size)
    if unknown is not None and not is_encoder_decoder:
        candidates.append(unknown)
    taken = (start_id, vocabulary.eos_id, *inputs_prefix)
    return next((i for i in candidates if i not in taken), vocabulary.eos_id)
