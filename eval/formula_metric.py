"""Formulas: how near the LaTeX that was read is to the true one, token by token.

A token is a command (`\\frac`), an escaped sign (`\\{`) or a single sign; blanks and the delimiters around a formula
(`$$`, `\\[`) mean nothing and are left out, so that `\\frac { a } { b }` equals `\\frac{a}{b}`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from rapidfuzz.distance import Levenshtein

from eval.metric import FloatArray, MeanScore

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\S", re.DOTALL)
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)"))
_ORDERS = 4  # n-grams of 1 to 4 tokens


class HasLatex(Protocol):
    @property
    def latex(self) -> str: ...


class Bleu(MeanScore):
    """Mean over formulas of sentence BLEU by sacrebleu (Papineni et al. 2002; n-grams of 1 to 4 tokens).

    The mean of sentences judges, not BLEU of the whole set: every formula counts the same and at most 1, so that one
    long formula, or one that repeats itself until the loop ends, cannot decide, and the bound of `eval.statistics`
    holds. BLEU of the set is shown beside it; published figures are counted on other tokens (the training code's),
    so these are not the same figure. For formulas shorter than four tokens the longer n-grams are left out.

    Counts: BLEU; exactly right (0 or 1); normalized edit similarity of tokens, 0..1; 1; then for BLEU of the set:
    matched n-grams [4], read n-grams [4], tokens read, tokens labelled.
    """

    name = "bleu"
    scores = ("bleu", "exact_match", "normalized_edit_similarity")

    def score(self, prediction: HasLatex, label: str) -> FloatArray:
        read, true = latex_tokens(prediction.latex), latex_tokens(label)
        result = _sacrebleu().sentence_score(" ".join(read), [" ".join(true)])
        similarity = Levenshtein.normalized_similarity(read, true)
        lengths = (result.sys_len, result.ref_len)
        counts = (min(result.score / 100, 1.0), read == true, similarity, 1, *result.counts, *result.totals, *lengths)
        return np.array(counts, dtype=np.float64)

    def details(self, total: FloatArray) -> dict[str, float]:
        return {**super().details(total), "corpus_bleu": corpus_bleu(total[len(self.scores) + 1 :])}


def corpus_bleu(counts: Sequence[float] | FloatArray) -> float:
    """BLEU of a set in percent, from summed counts: matched n-grams [4], read n-grams [4], tokens read and labelled."""
    from sacrebleu.metrics.bleu import BLEU

    whole = [round(float(count)) for count in counts]
    matched, read, (found, labelled) = whole[:_ORDERS], whole[_ORDERS : 2 * _ORDERS], whole[2 * _ORDERS :]
    return float(BLEU.compute_bleu(matched, read, found, labelled).score)


def latex_tokens(latex: str) -> list[str]:
    """The tokens of a formula, without blanks and without the delimiters around it."""
    latex = latex.strip()
    for start, end in _DELIMITERS:
        if len(latex) > len(start + end) and latex.startswith(start) and latex.endswith(end):
            return _TOKEN.findall(latex[len(start) : -len(end)])
    return _TOKEN.findall(latex)


@cache
def _sacrebleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="none", effective_order=True)
