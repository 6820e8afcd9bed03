"""Scores of a benchmark's responses: results.json, a line, and a page of problems and responses to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_aspo.batch import Prompt
from megatron_aspo.errors import RunError
from megatron_aspo.rollout.statistics import LEVEL, Estimate, mean_with_interval, pass_at_k
from megatron_aspo.tools.evaluation.responses import Response
from megatron_aspo.tools.pages import PAGES

PAGE_CHARACTERS = 16_000_000
"""Limit for all responses of a page, shared equally."""

LEAST_CHARACTERS = 500
"""Characters of a response that are always shown."""


@dataclass(frozen=True)
class Results:
    """Scores of one benchmark.

    Attributes:
        problems: problem id -> its responses.
        pass_at: k -> pass@k, the mean over problems with at least k verdicts; k = 1 is avg@samples.
        unjudged, truncated: shares of all responses without a verdict, and cut at the length limit.
        mean_length: tokens per response.
    """

    settings: dict[str, Any]
    problems: dict[str, list[Response]]
    pass_at: dict[int, Estimate]
    unjudged: float
    truncated: float
    mean_length: float

    def __str__(self) -> str:
        scores = ", ".join(f"{self._name(k)} {estimate}" for k, estimate in self.pass_at.items())
        return (
            f"{self.settings['benchmark']}, {self.settings['checkpoint']}, {len(self.problems)} problems: {scores} %; "
            f"{self.unjudged:.1%} not judged, {self.truncated:.1%} cut off, {self.mean_length:.0f} tokens per response"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.settings["benchmark"],
            "problems": len(self.problems),
            "samples": self.settings["samples"],
            **{self._name(k): asdict(estimate) for k, estimate in self.pass_at.items()},
            "level": LEVEL,
            "unjudged": self.unjudged,
            "truncated": self.truncated,
            "mean_length": self.mean_length,
            "settings": self.settings,
            "correct": {problem: sum(r.right for r in responses) for problem, responses in self.problems.items()},
        }

    def page(self, prompts: Mapping[str, Prompt]) -> str:
        """An HTML page of all problems, those with the fewest right responses first."""
        count = sum(map(len, self.problems.values()))
        return PAGES.get_template("evaluation/page.html").render(
            results=self,
            prompts=prompts,
            problems=sorted(self.problems.items(), key=lambda item: sum(response.right for response in item[1])),
            characters=max(LEAST_CHARACTERS, PAGE_CHARACTERS // count),
            cut=_cut,
        )

    def _name(self, k: int) -> str:
        return f"avg@{self.settings['samples']}" if k == 1 else f"pass@{k}"


def summarize(settings: dict[str, Any], responses: Sequence[Response]) -> Results:
    """Results of `responses`. Those without a verdict do not count, neither as right nor as wrong.

    Raises:
        RunError: no response has a verdict.
    """
    problems: dict[str, list[Response]] = {}
    for response in responses:
        problems.setdefault(response.problem, []).append(response)
    judged = [[r.right for r in answers if not r.unjudged] for answers in problems.values()]
    if not any(judged):
        raise RunError(f"{settings['benchmark']}: no response could be judged: {responses[0].unjudged}")
    samples = settings["samples"]
    pass_at: dict[int, Estimate] = {}
    for k in sorted({samples, *(1 << i for i in range(samples.bit_length()))}):  # 1, 2, 4, ... and all
        if rates := [pass_at_k(len(right), sum(right), k) for right in judged if len(right) >= k]:
            pass_at[k] = mean_with_interval(rates)
    count = len(responses)
    return Results(
        settings,
        problems,
        pass_at,
        unjudged=sum(bool(response.unjudged) for response in responses) / count,
        truncated=sum(response.finish_reason == "length" for response in responses) / count,
        mean_length=sum(response.length for response in responses) / count,
    )


def _cut(text: str, characters: int) -> str:
    """Beginning and end of a long text: a response's answer stands at its end."""
    if len(text) <= characters:
        return text
    begin = characters // 3
    end = characters - begin
    return f"{text[:begin]}\n[... {len(text) - characters:,} characters ...]\n{text[-end:]}"
