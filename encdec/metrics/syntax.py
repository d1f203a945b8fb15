"""Syntax trees of code, compared as CodeBLEU does (Ren et al. 2020, section 3.2)."""

from __future__ import annotations

import collections
import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from encdec.metrics.score import Score, ratio_score
from encdec.packages import install_hint

# Languages and the packages with their grammars, installed by the extra "code".
GRAMMARS = {"java": "tree_sitter_java", "c_sharp": "tree_sitter_c_sharp"}
CLASS = b"class C {\n"


def can_parse(language: str) -> bool:
    """Whether tree-sitter and the language's grammar are installed."""
    return all(importlib.util.find_spec(name) for name in ("tree_sitter", GRAMMARS[language]))


@functools.cache
def _parser(language: str) -> Any:
    import tree_sitter

    grammar = importlib.import_module(GRAMMARS[language])
    return tree_sitter.Parser(tree_sitter.Language(grammar.language()))


def subtrees(code: str, language: str) -> collections.Counter[str]:
    """All subtrees with children of some members of a class, as S-expressions of node types.

    Names, values and punctuation are left out, as in CodeBLEU. The tasks' texts are methods, so
    they are parsed inside a class, whose own nodes are not counted.
    """
    tree = _parser(language).parse(CLASS + code.encode() + b"\n}")
    # Iteratively, since a model may write thousands of brackets; children before their parents.
    order, waiting = [], list(tree.root_node.children)
    while waiting:
        order.append(node := waiting.pop())
        waiting += node.children
    shapes: dict[int, str] = {}
    found: collections.Counter[str] = collections.Counter()
    for node in reversed(order):
        inner = [shapes[child.id] for child in node.children if child.is_named]
        shapes[node.id] = f"({' '.join([node.type, *inner])})"
        if node.children and node.start_byte >= len(CLASS):
            found[shapes[node.id]] += 1
    return found


def syntax_match(reference: str, answer: str, language: str) -> tuple[int, int]:
    """(number of the reference's subtrees found in the answer, with multiplicity; number of
    all)."""
    wanted, found = subtrees(reference, language), subtrees(answer, language)
    return (wanted & found).total(), wanted.total()


def code_syntax(
    language: str, references: Sequence[Sequence[str]], predictions: Sequence[str]
) -> list[Score]:
    """CodeBLEU's syntax match over all examples, 0 to 100.

    With several references, the best match counts.
    """
    counts = [
        max(
            (syntax_match(one, text, language) for one in texts),
            key=lambda pair: pair[0] / max(pair[1], 1),
        )
        for texts, text in zip(references, predictions, strict=True)
    ]
    return ratio_score(
        "syntax_match", [matched for matched, _ in counts], [total for _, total in counts], 100
    )


def missing_grammar(language: str) -> str:
    """What to install for a language's syntax match; "" if it is installed."""
    return "" if can_parse(language) else f"syntax_match of {language}: {install_hint('code')}"
