"""Command-line options of an evaluation, checked before anything slow starts."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from megatron_aspo.config.checks import check_together
from megatron_aspo.config.data import SourceConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.tools.evaluation.benchmarks import Selection, select
from megatron_aspo.tools.evaluation.options import OPTIONS

TEMPERATURE, TOP_P = 0.8, 0.95
"""The values of the evaluation scripts of ASPO's authors (github.com/wizard-III/Archer2.0, mathematics and code)."""


@dataclass(frozen=True)
class EvaluationPlan:
    """Benchmarks to evaluate, with their sampling settings.

    Attributes:
        config: the run's configuration with the evaluation's sources and sampling.
        selections: the benchmarks; empty for the run's held-out prompts.
        out: folder of all results.
    """

    config: RunConfig
    selections: tuple[Selection, ...]
    temperature: float
    out: Path

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace, config: RunConfig) -> Self:
        """
        Raises:
            UserError: an unknown benchmark, a missing file, or options that contradict each other.
        """
        for option in () if arguments.benchmark else OPTIONS:
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} is for benchmarks; name one with --benchmark")
        temperature = TEMPERATURE if arguments.temperature is None else arguments.temperature
        top_p = TOP_P if arguments.top_p is None else arguments.top_p
        samples, template = arguments.samples, arguments.prompt_template
        largest = float("inf") if temperature else 1  # greedy responses to a problem are the same
        for option, value, is_valid, expected in (
            ("temperature", temperature, 0 <= temperature < float("inf"), ">= 0"),
            ("top-p", top_p, 0 < top_p <= 1, "in (0, 1]"),
            ("samples", samples, samples is None or 1 <= samples <= largest, ">= 1, and 1 at temperature 0"),
            ("prompt-template", template, template is None or "{" in template, "a text with {prompt}"),
        ):
            if not is_valid:
                raise UserError(f"--{option} {value} must be {expected}")
        selections = tuple(select(text, config, samples, template, not temperature) for text in arguments.benchmark)
        labels = [selection.label for selection in selections]
        for label in labels:
            if labels.count(label) > 1:
                raise UserError(f"--benchmark {label} is given twice; give its files as a pattern or a folder")
        if selections:
            defaults = {f.name: getattr(SourceConfig(), f.name) for f in fields(SourceConfig)}
            config = replace(
                config,
                data=replace(config.data, **defaults, sources=tuple(selection.source for selection in selections)),
                rollout=replace(config.rollout, top_p=top_p, top_k=0),
                # Training may sample some of a problem's tests; a benchmark's answer must pass all.
                reward=replace(config.reward, code=replace(config.reward.code, tests=None)),
            )
            check_together(config)  # an environment may not fit the benchmark
        return cls(config, selections, temperature, arguments.out or config.run_dir / "eval")

    def settings(self, selection: Selection, problems: str, weights: dict[str, Any]) -> dict[str, Any]:
        """Everything that the responses and their scores depend on. `problems` is `problems_hash`."""
        rollout = self.config.rollout
        judge = {"math": self.config.reward.math, "code": self.config.reward.code}.get(selection.benchmark.reward)
        reward = {} if judge is None else {name: value for name, value in asdict(judge).items() if name != "workers"}
        return {
            "benchmark": selection.label,
            **weights,
            "problems": problems,
            "samples": selection.samples,
            "temperature": self.temperature,
            "top_p": rollout.top_p,
            "max_response_tokens": rollout.max_response_tokens,
            "stop": list(rollout.stop),
            "seed": self.config.seed,
            "engine": rollout.engine,
            "dtype": self.config.model.dtype,
            "quantization": rollout.quantization,
            "reward": reward,
        }
