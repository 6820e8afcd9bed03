r"""Rewrites notation that math-verify misreads or cannot read.

| written | math-verify 0.9 by itself |
|---|---|
| `1\,000`, `1 000`, `4 5` | 1 · 000, 1 + 000, 4 + 5: digits with a space between are a mixed number |
| `6.02e23`, `1e-5` | 6.02 · e · 23, with Euler's e |
| `2t`, `5c`, `3h` | 2, 5, 3: single letters are units |
| `4 \text{ or 5}` | 4: text at the end is a unit |
| `Monday` | the product M · o · n · d · a · y, equal to that of any other order |
| `0.\overline{3}` | not a number |
| `5.`, `90°`, `½`, `√2`, `5²`, `−1` | not read |
"""

from __future__ import annotations

import re

_UNICODE = str.maketrans(
    {
        **{"−": "-", "–": "-", "⁄": "/", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "±": r"\pm "},
        **{"π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "},
        **{"∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "≈": r"\approx "},
        **{"\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": None, "\u200c": None, "\u200d": None, "\ufeff": None},
        **{sign: rf"\frac{{{n}}}{{{d}}}" for sign, n, d in ("½12", "⅓13", "⅔23", "¼14", "¾34", "⅕15", "⅛18")},
    }
)
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
_TO_DIGITS = str.maketrans(_SUPERSCRIPTS, "0123456789-")

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_GAP = r"(?:\\[,;:! ]|~|\s|\\q?quad\b)"
_THOUSANDS = re.compile(rf"(?<![0-9.,])([+-]?[0-9]{{1,3}})((?:(?:{_GAP}|\\!,|\{{,\}})[0-9]{{3}})+)(\.[0-9]+)?$")
_NUMBERS_SIDE_BY_SIDE = re.compile(rf"[+-]?{_NUMBER}(?:{_GAP}+{_NUMBER})+")
_MIXED = re.compile(r"([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]+)\}")
_SCIENTIFIC = re.compile(rf"(?<![A-Za-z0-9.\\])({_NUMBER})[eE]\+?(-?[0-9]+)(?![A-Za-z0-9.])")
_WORDS = re.compile(r"(?!infinity$)[A-Za-z]{4,}(?: [A-Za-z]+)*")
_TEXT = r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit|rm)\s*\{([^{}]*)\}"
_TEXT_UNIT = re.compile(rf"(?<=\S){_GAP}*{_TEXT}(?:\s*\^\s*(?:[0-9]|\{{-?[0-9]\}}))?$")
_HEDGE = re.compile(r"[0-9]|\b(?:or|and)\b")
_UNIT_WORDS = "|".join(
    (
        "mm|cm|dm|km|ft|in|yd|mi|mg|kg|lb|lbs|oz|ml|mL|ms|min|hr|hrs|mph|kmh|km/h|m/s|Hz|rad|deg|USD|Pa|eV|mol",
        "inch(?:es)?|foot|feet|(?:centi|milli|kilo)?met(?:er|re)s?|yards?|miles?|(?:kilo|milli)?grams?|pounds?|ounces?",
        "lit(?:er|re)s?|gallons?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|degrees?|dollars?|cents?|euros?",
        "rupees?|radians?|units?|points?|people|students?|ways?|times?|square units?|cubic units?",
        "square (?:cm|feet|inches|meters?)",
    )
)
_UNIT_WORD = re.compile(rf"(?<=[0-9}}])\s*(?:{_GAP})*(?:{_UNIT_WORDS})(?:\s*\^\s*(?:[23]|\{{[23]\}}))?$")
_UNIT_LETTER = re.compile(rf"(?<=[0-9}}]){_GAP}+[mgslLhJNWVAKC](?:\s*\^\s*(?:[23]|\{{[23]\}}))?$")
_DEGREES = re.compile(rf"(?<=[0-9}}])\s*\^\s*(?:\\circ|\{{\s*\\circ\s*\}})\s*(?:[CF]|{_TEXT})?$")
_PERCENT = re.compile(r"\s*(?:\\?%|\b(?:percent|percentage|pct)\b|\\text\s*\{\s*(?:\\?%|percent)\s*\})$")
_BASED = re.compile(r"([0-9A-F]+)_(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_CHOICE = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf|textrm|mbox)\s*\{\s*)?(?:\(([A-J])\)|([A-J])(?:[.:)]|(?=\})|$))\s*\}?"
    rf"(?:{_GAP}|[.:])*(.*)",
    re.DOTALL,
)


def rewrite(text: str, *, letter_units: bool = False) -> str:
    r"""The same answer in LaTeX that math-verify reads correctly, without dollar signs and units.

    Args:
        letter_units: treat a letter after a number and a space as a unit: `5 m`. Correct if the other answer is a plain
            number, because the letter is then no variable.
    """
    text = text.translate(_UNICODE)
    text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda m: f"^{{{m[0].translate(_TO_DIGITS)}}}", text)
    text = re.sub(r"√\s*([0-9.]+|[A-Za-z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    text = re.sub(r"\\[!]|\\left(?=\.)\.|\\right(?=\.)\.|\\displaystyle|\\boxed(?=\s*\{)", "", text)
    text = text.replace(r"\varnothing", r"\emptyset").strip().strip("$").strip()
    text = re.sub(rf"(?:[.;,]|{_GAP}|\\\\)+$", "", text)
    text = re.sub(r"^\\\$\s*|^[€£¥]\s*", "", text)
    for unit in (_DEGREES, _TEXT_UNIT, _UNIT_WORD) + ((_UNIT_LETTER,) if letter_units else ()):
        match = unit.search(text)
        if match and text[: match.start()].strip() and not _HEDGE.search("".join(filter(None, match.groups()))):
            text = text[: match.start()].strip()
    text = _THOUSANDS.sub(lambda m: m[1] + re.sub(r"[^0-9]", "", m[2]) + (m[3] or ""), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _REPEATING.sub(_fraction, text)
    text = _SCIENTIFIC.sub(r"\1\\cdot 10^{\2}", text)
    return rf"\text{{{text}}}" if _WORDS.fullmatch(text) else text


def _fraction(decimal: re.Match[str]) -> str:
    whole, fixed, period = decimal.groups()
    denominator = (10 ** len(period) - 1) * 10 ** len(fixed)
    return rf"\frac{{{int(whole + fixed + period) - int(whole + fixed or 0)}}}{{{denominator}}}"


def is_ambiguous(text: str) -> bool:
    """Whether the text has several numbers, side by side or in words behind, any of which may be the answer."""
    match = _TEXT_UNIT.search(text)
    tail = match is not None and _HEDGE.search(match[1]) is not None
    return tail or _NUMBERS_SIDE_BY_SIDE.fullmatch(text) is not None


def percentage(text: str) -> str | None:
    """The number before a final percent sign, or None."""
    match = _PERCENT.search(text)
    return text[: match.start()] if match and match.start() else None


def with_base(text: str) -> tuple[str, int] | None:
    """(digits, base) of a number such as `101_2`, or None."""
    match = _BASED.fullmatch(text)
    return (match[1].lstrip("0"), int(match[2] or match[3])) if match else None


def choice(text: str) -> str | None:
    r"""The letter of a multiple choice, as in `C`, `(C)`, `\textbf{(C)}\ 5` or `C. five`; None where it names two."""
    match = _CHOICE.fullmatch(text.strip().strip("$").strip())
    if match is None or re.search(r"\([A-J]\)|\b[A-J]\b", match[3]):
        return None
    return match[1] or match[2]
