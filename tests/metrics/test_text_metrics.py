"""Scores against other implementations, closed forms and the official definitions."""

from __future__ import annotations

import collections
import gzip
import json
import math
import re
import string

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from encdec.errors import ConfigError, DataError
from encdec.metrics import text_metrics as scores
from encdec.metrics.metric_registry import (
    METRICS,
    metric_named,
    not_measured,
    register,
    score_texts,
)
from encdec.metrics.score import Metric, best_of, mean_score

REFERENCES = [["the cat sat on the mat", "a cat sat"], ["hello there world of ours"], ["x y z w"]]
PREDICTIONS = ["the cat sat on a mat", "hello there world of mine", "z y x w v"]


def by_name(found):
    return {score.name: score for score in found}


def value(score):
    return score.value


def official_squad(golds, prediction):
    """(EM, F1) as evaluate-v2.0.py states them, written here from its definition."""

    def normal(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(gold, guess):
        gold, guess = normal(gold).split(), normal(guess).split()
        if not gold or not guess:
            return int(gold == guess)
        same = sum((collections.Counter(gold) & collections.Counter(guess)).values())
        if not same:
            return 0
        precision, recall = same / len(guess), same / len(gold)
        return 2 * precision * recall / (precision + recall)

    golds = [gold for gold in golds if normal(gold)] or [""]
    return (
        max(int(normal(g) == normal(prediction)) for g in golds),
        max(f1(g, prediction) for g in golds),
    )


def test_squad_by_hand():
    references = [["the Eiffel Tower", "Eiffel"], [], ["unanswerable"], ["Paris"], ["a", "Rome"]]
    predictions = ["eiffel tower!", "unanswerable", "London", "Unanswerable.", "a"]
    found = by_name(scores.squad_v2(references, predictions))
    assert found["em"].parts_ExK[:, 0].tolist() == [100, 100, 0, 0, 0]
    assert (found["has_answer_em"].count, found["no_answer_em"].count) == (3, 2)
    assert value(found["no_answer_f1"]) == 50
    assert value(found["has_answer_f1"]) == pytest.approx(100 / 3)


def check_against_official(questions):
    references = [[a["text"] for a in q["answers"]] for q in questions]
    # Right, cut, another's and no answers, so that every case comes up.
    predictions = []
    for i, texts in enumerate(references):
        text = (texts or ["something"])[-1]
        words = text.split()
        predictions.append(
            [
                text,
                " ".join(words[: max(1, len(words) // 2)]) + " the end",
                (references[i - 1] or [""])[0],
                "",
            ][i % 4]
        )
    truth = np.array([official_squad(r, p) for r, p in zip(references, predictions)])
    shown = [text or "unanswerable" for text in predictions]
    found = by_name(scores.squad_v2(references, shown))
    np.testing.assert_allclose(found["em"].parts_ExK[:, 0], 100 * truth[:, 0])
    np.testing.assert_allclose(found["f1"].parts_ExK[:, 0], 100 * truth[:, 1])
    has = np.array([bool(r) for r in references])
    for name, mask in (("has_answer", has), ("no_answer", ~has)):
        assert value(found[f"{name}_f1"]) == pytest.approx(100 * truth[mask, 1].mean())


def test_squad_equals_the_official_definition():
    answers = [["The  Beatles", "Beatles, The"], [], ["1,000 m"], ["co-operate"], ["an apple"]]
    check_against_official([{"answers": [{"text": t} for t in a]} for a in answers * 4])


@pytest.mark.corpora
def test_squad_equals_the_official_definition_on_real_answers(corpora):
    with gzip.open(corpora / "squad" / "dev-v2.0-visible10.json.gz") as file:
        articles = json.load(file)["data"]
    check_against_official([q for a in articles for p in a["paragraphs"] for q in p["qas"]])


@pytest.mark.parametrize("stemmed", [False, True])
def test_rouge_equals_the_librarys(stemmed):
    suffix = "_stemmed" if stemmed else ""
    found = by_name((scores.rouge_stemmed if stemmed else scores.rouge)(REFERENCES, PREDICTIONS))
    scorer = rouge_scorer.RougeScorer(list(scores.ROUGE), use_stemmer=stemmed)
    for name in scores.ROUGE:
        truth = [
            max(scorer.score(r, p)[name].fmeasure for r in rs)
            for rs, p in zip(REFERENCES, PREDICTIONS)
        ]
        np.testing.assert_allclose(found[name + suffix].parts_ExK[:, 0], 100 * np.array(truth))


def test_the_two_rouges_differ_by_porters_stems_alone():
    wanted, found = [["the foxes were jumping over dogs"]], ["the fox is jumps over dog"]
    # Without stems: the, over of 6 words each; with them fox, jump and dog too.
    assert value(by_name(scores.rouge(wanted, found))["rougeL"]) == pytest.approx(100 * 2 / 6)
    stemmed = by_name(scores.rouge_stemmed(wanted, found))
    assert value(stemmed["rougeL_stemmed"]) == pytest.approx(100 * 5 / 6)
    assert value(by_name(scores.rouge([["a b c d"]], ["a c d e"]))["rougeL"]) == 75


SCRIPTS = {
    "Russian": ("кошка сидит на окне", "кошка лежит на окне", 75),
    "Greek": ("η γάτα κάθεται εδώ", "Η ΓΆΤΑ κάθεται", 600 / 7),
    "Hindi": ("बिल्ली खिड़की पर बैठी", "बिल्ली खिड़की पर थी", 75),
    "Chinese": ("猫坐在窗边", "猫在窗边", 800 / 9),
    "Thai": ("แมวดี", "แมวดู", 75),  # four letters of four each, a mark belonging to its letter
    "accents": ("un café très noir", "un cafe très noir", 75),
    "English": ("The cat, sat!", "the cat sat", 100),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_rouge_of_every_script(script):
    wanted, found, truth = SCRIPTS[script]
    same = by_name(scores.rouge_unicode([[wanted]], [wanted]))
    assert all(value(score) == 100 for name, score in same.items() if name[5] in "1L")
    assert value(by_name(scores.rouge_unicode([[wanted]], [found]))["rouge1_unicode"]) == (
        pytest.approx(truth)
    )


def test_what_a_metric_cannot_read_is_said():
    with pytest.warns(UserWarning, match="1 of 2 references have other letters; 1 have no"):
        russian = scores.rouge([["кошка"], ["cat"]], ["кошка", "cat"])
    assert value(by_name(russian)["rougeL"]) == 50
    assert all("rouge_unicode reads" in score.remark for score in russian)
    with pytest.warns(UserWarning, match=r"have other letters\. The metric"):
        scores.rouge_stemmed([["café noir"]], ["x"])
    assert not any(one.remark for one in scores.rouge(REFERENCES, PREDICTIONS))
    assert not any(one.remark for one in scores.rouge_unicode([["кошка"]], ["x"]))
    [chinese] = scores.bleu([["猫坐在窗边"]], ["猫坐在窗边"])
    assert value(chinese) == 0 and "1 of 1 references have fewer than four" in chinese.remark
    [english] = scores.bleu(REFERENCES, PREDICTIONS)
    assert not english.remark


def codexglue_bleu(references, predictions):
    """CodeXGLUE's evaluator as its code states it, written again here: lists of words, smooth."""
    matches, possible, length, wanted = [0] * 4, [0] * 4, 0, 0
    for texts, prediction in zip(references, predictions):
        words, golds = prediction.strip().split(), [text.strip().split() for text in texts]
        length, wanted = length + len(words), wanted + min(map(len, golds))
        for order in (1, 2, 3, 4):
            grams = lambda ws, n=order: [tuple(ws[i : i + n]) for i in range(len(ws) - n + 1)]
            possible[order - 1] += max(len(words) - order + 1, 0)
            for gram in set(grams(words)):
                most = max(grams(gold).count(gram) for gold in golds)
                matches[order - 1] += min(grams(words).count(gram), most)
    logs = [math.log((m + 1) / (p + 1)) / 4 for m, p in zip(matches, possible)]
    ratio = length / wanted
    return 100 * math.exp(sum(logs)) * (1 if ratio > 1 else math.exp(1 - 1 / ratio))


def test_bleu_as_codexglue_computes_it():
    java = [
        ["public int get ( ) { return a ; }"],
        ["void f ( int a ) { b . c ( a ) ; }", "void f ( ) { }"],
        ["x y"],
    ]
    found = ["public int get ( ) { return b ; }", "void f ( int a ) { c ( a ) ; }", "x z w"]
    for texts, answers in (
        (java, found),
        (java[:1], ["int"]),
        (java[2:], ["a b"]),
        (java[1:2], ["void f ( ) { g ( ) ; } }"]),
        (REFERENCES, PREDICTIONS),
    ):
        [score] = scores.bleu_codexglue(texts, answers)
        assert value(score) == pytest.approx(codexglue_bleu(texts, answers))
    [score] = scores.bleu_codexglue(java, found)
    twice = [0, 0, 2]
    assert score.statistic(np.array([twice])) == pytest.approx(
        codexglue_bleu([java[i] for i in twice], [found[i] for i in twice])
    )
    [empty] = scores.bleu_codexglue([["a b"]], [""])
    assert value(empty) == 0  # where their own divides by zero
    # Exact match, as their evaluators count it: lines without white space at the ends.
    assert metric_named("exact_match")(["a b ", ["x", "c"]], [" a b", "c "]) == {
        "exact_match": 100.0
    }


def test_bleu_equals_the_librarys_on_every_sample():
    [score] = scores.bleu(REFERENCES, PREDICTIONS)
    for sample in ([0, 1, 2], [0, 0, 1], [1, 1, 2], [0]):
        references = [[REFERENCES[i][0] for i in sample], [REFERENCES[i][-1] for i in sample]]
        truth = sacrebleu.corpus_bleu(
            [PREDICTIONS[i] for i in sample], references, tokenize="none", force=True
        )
        assert score.statistic(np.array([sample])) == pytest.approx(truth.score)


def test_bleu_equals_the_librarys_whatever_is_missing():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abc"), rng.integers(0, 7))) for _ in range(120)]
    for i in range(0, 120, 2):
        [score] = scores.bleu([[texts[i] or "a"]], [texts[i + 1]])
        truth = sacrebleu.corpus_bleu(
            [texts[i + 1]], [[texts[i] or "a"]], tokenize="none", force=True
        )
        assert value(score) == pytest.approx(truth.score), (texts[i], texts[i + 1])


def kappa(first, second):
    return scores.kappa_of_sums(scores.kappa_parts(first, second).sum(axis=0)[None])[0]


def test_chrf_is_the_mean_of_the_librarys():
    [score] = scores.chrf(REFERENCES, PREDICTIONS)
    truth = [sacrebleu.sentence_chrf(p, r).score for p, r in zip(PREDICTIONS, REFERENCES)]
    np.testing.assert_allclose(score.parts_ExK[:, 0], truth)


def test_kappa_equals_its_definition_by_matrices():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 19, 200)
    second = np.clip(first + rng.integers(-3, 4, 200), 0, 18)
    observed = np.zeros((19, 19))
    np.add.at(observed, (first, second), 1)
    weights = (np.arange(19)[:, None] - np.arange(19)) ** 2
    chance = np.outer(observed.sum(1), observed.sum(0)) / 200
    truth = 1 - (weights * observed).sum() / (weights * chance).sum()
    assert kappa(first, second) == pytest.approx(truth)
    assert kappa(first, first) == 1
    assert np.isnan(kappa([3, 3], [3, 3]))


def test_kappa_equals_scikit_learns():
    sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn not installed")
    first, second = np.array([1, 2, 3, 4, 4, 0]), np.array([1, 3, 3, 2, 4, 1])
    assert kappa(first, second) == pytest.approx(
        sklearn_metrics.cohen_kappa_score(first, second, weights="quadratic")
    )


def test_a_band_that_is_missing_is_never_a_good_one():
    found = by_name(scores.bands([["6.5"], ["7.0"], ["3"]], ["Band 6", "no idea", "7.5/9"]))
    assert found["band_error"].parts_ExK[:, 0].tolist() == [0.5, 9.0, 4.5]
    assert value(found["band_missing"]) == pytest.approx(100 / 3)
    worse = by_name(scores.bands([["6.5"], ["7.0"], ["3"]], ["6", "0", "7.5"]))
    assert value(found["kappa"]) == value(worse["kappa"])


def test_a_reference_that_is_no_band_is_named():
    with pytest.raises(DataError, match="the metric bands cannot use the reference 'good'"):
        scores.bands([["good"]], ["6"])
    for wrong in ("nan", "65", "-1"):
        with pytest.raises(DataError, match=f"reference '{wrong}'; expected a number from 0 to 9"):
            scores.bands([[wrong]], ["6"])


def test_every_metric_says_its_convention_and_gives_what_it_says():
    texts = [["6.5"], ["7"]]
    for name, metric in METRICS.items():
        assert metric.name == name and len(metric.convention) > 40
        if not metric.needs():
            found = {score.name for score in metric.scores(texts, ["7", "6"])}
            assert found <= set(metric.gives) and (found or name == "squad_v2"), name
            assert metric.scores([], []) == [] and metric([], []) == {}
    with pytest.raises(ValueError, match="2 references but 1"):
        METRICS["exact_match"](["a", "b"], ["a"])
    with pytest.raises(DataError, match="example 1 has no reference for bleu"):
        METRICS["bleu"](["a", []], ["a", "b"])


def test_metrics_and_single_scores_are_found_by_name():
    assert metric_named("rougeL_stemmed")(["a cat sat"], ["cats sat"]) == {
        "rougeL_stemmed": pytest.approx(80)
    }
    with pytest.raises(
        ConfigError, match="unknown metric 'rouge_stemed'.*did you mean 'rouge_stemm"
    ):
        metric_named("rouge_stemed")
    with pytest.raises(ConfigError, match="of several metrics; name one of syntax_java, syntax_c"):
        metric_named("syntax_match")
    names = [
        score.name for score in score_texts(("rouge", "rougeL", "bleu"), REFERENCES, PREDICTIONS)
    ]
    assert names == [*scores.ROUGE, "bleu"] and not_measured(("rouge",)) == []


def test_a_metric_of_the_users_own(monkeypatch):
    monkeypatch.setattr("encdec.metrics.metric_registry.METRICS", dict(METRICS))
    first = lambda wanted, found: 100.0 * (wanted[:1] == found[:1])
    mine = lambda wanted, found: mean_score("first_letter", best_of(first, wanted, found))
    register(
        Metric("first_letter", "share with the reference's first letter", mine, ("first_letter",))
    )
    [score] = score_texts(("first_letter",), [["ab"], ["b", "c"]], ["ax", "x"])
    assert (score.name, value(score)) == ("first_letter", 50)
    with pytest.raises(ConfigError, match="a metric 'rouge' is already registered"):
        register(Metric("rouge", "mine", mine, ("first_letter",)))
