"""Syntax match against what CodeBLEU counts, on code small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from encdec.data.paper_tasks import PAPER_TASKS
from encdec.metrics.metric_registry import not_measured, score_texts
from encdec.metrics.syntax import GRAMMARS, can_parse, code_syntax, subtrees, syntax_match

if not all(map(can_parse, GRAMMARS)):
    pytest.skip("tree-sitter is not installed: the extra code of setup.py", allow_module_level=True)

METHOD = "public int F(int a){return a + 1;}"


def test_subtrees_by_hand():
    assert dict(subtrees(METHOD, "c_sharp")) == {
        "(modifier)": 1,
        "(parameter (predefined_type) (identifier))": 1,
        "(parameter_list (parameter (predefined_type) (identifier)))": 1,
        "(binary_expression (identifier) (integer_literal))": 1,
        "(return_statement (binary_expression (identifier) (integer_literal)))": 1,
        "(block (return_statement (binary_expression (identifier) (integer_literal))))": 1,
        "(method_declaration (modifier) (predefined_type) (identifier) (parameter_list (parameter "
        "(predefined_type) (identifier))) (block (return_statement (binary_expression (identifier) "
        "(integer_literal)))))": 1,
    }
    assert not subtrees("", "java")


def test_names_do_not_matter_and_structure_does():
    assert syntax_match(METHOD, "public int G(int b){return b + 2;}", "c_sharp") == (7, 7)
    # The statement, the block and the method differ; modifier, parameter and list do not.
    assert syntax_match(METHOD, "public int F(int a){return a;}", "c_sharp") == (3, 7)
    assert syntax_match(METHOD, "", "c_sharp") == (0, 7)
    # Each subtree counts as often as the answer has it.
    twice = "int F(int a, int b){return a;}"
    once = "int F(int a){return a;}"
    matched, total = syntax_match(twice, once, "c_sharp")
    assert subtrees(twice, "c_sharp")["(parameter (predefined_type) (identifier))"] == 2
    assert (matched, total) == (3, 6)
    # Whatever a model writes can be parsed.
    assert syntax_match(METHOD, "}" * 50 + "(" * 2000, "c_sharp")[1] == 7


def test_java_too():
    buggy, fixed = "void f ( ) { a . b ( ) ; }", "void f ( ) { if ( x ) a . b ( ) ; }"
    matched, total = syntax_match(fixed, buggy, "java")
    assert 0 < matched < total and syntax_match(fixed, fixed, "java") == (total, total)


def test_the_score_is_of_all_examples_and_of_the_best_reference():
    references = [[METHOD, "int x;"], [METHOD], [METHOD]]
    answers = ["int y;", "public int F(int a){return a;}", METHOD]
    [score] = code_syntax("c_sharp", references, answers)
    total = sum(subtrees("int x;", "c_sharp").values())
    assert score.value == pytest.approx(100 * (total + 3 + 7) / (total + 14))
    assert score.statistic(np.array([[2, 2]])) == 100
    assert [
        one.name for one in score_texts(PAPER_TASKS["code_java2cs"].metrics, references, answers)
    ][-1] == ("syntax_match")


def test_without_grammars_the_score_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr("encdec.metrics.syntax.can_parse", lambda language: False)
    names = [
        one.name for one in score_texts(PAPER_TASKS["code_java2cs"].metrics, [[METHOD]], [METHOD])
    ]
    assert "bleu" in names and "syntax_match" not in names
    (said,) = not_measured(PAPER_TASKS["code_java2cs"].metrics)
    assert said.startswith("syntax_match of c_sharp: pip install -e ") and "[code]" in said
    assert not_measured(("rouge",)) == []
