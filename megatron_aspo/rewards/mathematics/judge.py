"""Whether two answers are equal, by math-verify. Runs in a worker; may take any time and memory."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import sympy
import sympy.core.random
from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig, NormalizationConfig

from megatron_aspo.rewards.mathematics.notation import choice, is_ambiguous, percentage, rewrite, with_base
from megatron_aspo.rewards.verdict import Verdict

type Expressions = list[Any]

# `rewrite` strips units, by rules that spare variables.
_LATEX = LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True),
)
_SEARCH = (LatexExtractionConfig(), ExprExtractionConfig())
_RIGHT, _WRONG = Verdict(1.0, "right"), Verdict(0.0, "wrong")


def compare(answer: str, accepted: list[str]) -> Verdict:
    """The verdict on an answer, the contents of a box."""
    return _RIGHT if any(_equal(answer, a) for a in accepted) else _WRONG


def search(text: str, accepted: list[str]) -> Verdict:
    """The verdict on the answer that math-verify finds in a text without a box."""
    sympy.core.random.seed(0)
    answer = parse(text, _SEARCH, parsing_timeout=0)
    if not answer:
        return Verdict(0.0, "no answer")
    return _RIGHT if any(_verify(_parse(rewrite(a)), answer) for a in accepted) else _WRONG


@functools.lru_cache(maxsize=4096)  # the responses of a group share the right answer, and many their own
def _equal(answer: str, right: str) -> bool:
    letter = choice(right)
    if letter is not None:
        chosen = choice(answer)
        if chosen is not None:
            return chosen == letter
    right = rewrite(right)
    answer = rewrite(answer, letter_units=re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", right)) is None)
    if answer == right:
        return answer != ""
    if is_ambiguous(answer):
        return False
    based = with_base(answer), with_base(right)
    if all(based):
        return based[0] == based[1]
    return any(_verify(_parse(b), _parse(a)) for a, b in _readings(answer, right))


def _readings(answer: str, right: str) -> list[tuple[str, str]]:
    """Pairs of answers to compare: if one has a percent sign, the other may leave it out or be a fraction."""
    percents = percentage(answer), percentage(right)
    if percents[0] is not None and percents[1] is not None:
        return [(percents[0], percents[1])]
    if percents[0] is not None:
        return [(percents[0], right), (_hundredth(percents[0]), right)]
    if percents[1] is not None:
        return [(answer, percents[1]), (answer, _hundredth(percents[1]))]
    return [(answer, right)]


def _hundredth(number: str) -> str:
    return rf"\frac{{{number}}}{{100}}"


@functools.lru_cache(maxsize=4096)
def _parse(latex: str) -> Expressions:
    """math-verify's parse of an answer: an expression, if it can be read, and its text."""
    sympy.core.random.seed(0)
    return [_exact(e) for e in parse(rf"\boxed{{{latex}}}", [_LATEX], parsing_timeout=0)]


def _exact(expression: Any) -> Any:
    """The expression with i as the imaginary unit if i is its only letter, and with the decimals of a computation
    (6.02 · 10^23) as fractions, because sympy's decimals equal no integer."""
    if not isinstance(expression, sympy.Expr):
        return expression
    if {str(symbol) for symbol in expression.free_symbols} == {"i"}:
        expression = expression.xreplace(dict.fromkeys(expression.free_symbols, sympy.I))
    if not expression.is_Atom and expression.is_number:
        decimals = {x: sympy.Rational(str(x)) for x in expression.atoms(sympy.Float)}
        if decimals:
            return expression.xreplace(decimals).doit()
    return expression


def _verify(right: Expressions, answer: Expressions) -> bool:
    sympy.core.random.seed(0)  # sympy tries random points
    scale = _scale(right)
    if scale != 1:
        right, answer = _scaled(right, scale), _scaled(answer, scale)
    return verify(right, answer, timeout_seconds=None, allow_set_relation_comp=True)


def _scale(right: Expressions) -> int:
    """The power of ten that scales a small number to one digit, because math-verify compares the first six places."""
    number = right[0] if right else None
    if not isinstance(number, sympy.Expr) or not number.is_number or not number.is_real:
        return 1
    magnitude = abs(sympy.N(number, 3))
    if not magnitude.is_Float or not 0 < magnitude < 1e-3:
        return 1
    return 10 ** -math.floor(sympy.log(magnitude, 10).evalf(6))


def _scaled(expressions: Expressions, scale: int) -> Expressions:
    return [e * scale if isinstance(e, sympy.Expr) and e.is_number else e for e in expressions]
