"""Scores against other implementations, closed forms and the official definitions."""

from __future__ import annotations

import collections
import gzip
import json
import re
import string

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from encdec.evaluation import scores

REFERENCES = [["the cat sat on the mat", "a cat sat"], ["hello there world of ours"], ["x y z w"]]
PREDICTIONS = ["the cat sat on a mat", "hello there world of mine", "z y x w v"]


def by_name(found):
    return {score.name: score for score in found}


def value(score):
    return score.statistic(np.arange(score.count))


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


def test_rouge_equals_the_librarys():
    found = by_name(scores.rouge(REFERENCES, PREDICTIONS))
    scorer = rouge_scorer.RougeScorer(list(scores.ROUGE), use_stemmer=False)
    for name in scores.ROUGE:
        truth = [
            max(scorer.score(r, p)[name].fmeasure for r in rs)
            for rs, p in zip(REFERENCES, PREDICTIONS)
        ]
        np.testing.assert_allclose(found[name].parts_ExK[:, 0], 100 * np.array(truth))


def test_bleu_equals_the_librarys_on_every_sample():
    [score] = scores.bleu(REFERENCES, PREDICTIONS)
    for sample in ([0, 1, 2], [0, 0, 1], [1, 1, 2], [0]):
        references = [[REFERENCES[i][0] for i in sample], [REFERENCES[i][-1] for i in sample]]
        truth = sacrebleu.corpus_bleu(
            [PREDICTIONS[i] for i in sample], references, tokenize="none", force=True
        )
        assert score.statistic(np.array(sample)) == pytest.approx(truth.score)


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
