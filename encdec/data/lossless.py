"""Whether a vocabulary gives text back unchanged, and what it loses if not."""

from __future__ import annotations

import string

from encdec.data.vocabulary import Vocabulary

CODE = "if (a < b) {\n\treturn ~c;  // \u00e9\n}\n"
CHARACTERS = string.punctuation + "\n\t"


def lost_characters(vocabulary: Vocabulary) -> str:
    """ASCII punctuation, newline and tab that do not survive between two letters."""
    return "".join(
        character
        for character in CHARACTERS
        if vocabulary.decode(vocabulary.encode(f"a{character}b")) != f"a{character}b"
    )


def lossless_warning(vocabulary: Vocabulary) -> str | None:
    """A warning with an example where code does not round-trip; None where it does."""
    back = vocabulary.decode(vocabulary.encode(CODE))
    lost = lost_characters(vocabulary)
    if back == CODE and not lost:
        return None
    what = f"loses {' '.join(map(repr, lost))}" if lost else "changes white space"
    return (
        f"this vocabulary does not give all text back: it {what}. {CODE!r} becomes {back!r}. "
        "For code take one with byte fallback (encdec vocab trains one)"
    )
