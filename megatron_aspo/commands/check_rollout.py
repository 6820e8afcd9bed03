"""`megatron-aspo check-rollout` on one rank: `torchrun ... -m megatron_aspo.commands.check_rollout CONFIG.yaml`

Compares the log-probs that the rollout engine reports with the trainer's for the same tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_aspo.batch import Prompt
from megatron_aspo.commands.arguments import run_rank
from megatron_aspo.commands.sampler import open_sampler
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data import PromptStream
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.journal.folder import find_checkpoint
from megatron_aspo.policy.metrics import measure_mismatch
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.rollout.engine import RolloutEngine
from megatron_aspo.train import set_logprobs

LIMITS = {"float32": (1e-4, 1e-5), "bfloat16": (0.06, 4e-3), "fp8": (0.3, 0.1)}
"""Largest mean |d| and KL that rounding explains, by the type of the model's products.

Two engines sum in different orders. Measured for a model of 135 M parameters: 8e-6 in float32; 0.05 and 2e-3 in
bfloat16; 0.28 and 0.09 with one side in FP8. With both sides in FP8 the errors are independent: the limits
are sqrt(2) and 2 times as high.
"""


@dataclass(frozen=True)
class Verdict:
    """Result of a check.

    Attributes:
        numbers: from `measure_mismatch`.
        again: the same after another refit, if the first ones were too large.
        causes: likely causes; none if the engine is sound.
    """

    tokens: int
    numbers: dict[str, float]
    again: dict[str, float] | None
    causes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.tokens} tokens; d = trainer's log-prob - sampler's, in nats"]
        for label, numbers in (("", self.numbers), ("after another refit: ", self.again)):
            if numbers is not None:
                lines.append(
                    f"{label}mean |d| {numbers['logprob_diff']:.2e}, max |d| {numbers['logprob_diff_max']:.2e}, "
                    f"mean d {numbers['logprob_bias']:+.2e}, KL {numbers['kl']:.2e}, "
                    f"ratio outside [0.5, 2] {numbers['outside']:.2%}"
                )
        found = f"MISMATCH beyond rounding: {self.causes[0]}" if self.causes else "the engine samples from the policy"
        return "\n".join([*lines, f"verdict: {found}"])


def check_rollout(policy: Policy, engine: RolloutEngine, prompts: list[Prompt], config: RunConfig) -> Verdict:
    """Sample, recompute the log-probs with the trainer and compare; after a mismatch, refit and repeat. Collective."""
    tokens, numbers = _measure(policy, engine, prompts, config)
    if is_sound(numbers, config):
        return Verdict(tokens, numbers, None, ())
    engine.refit()
    _, again = _measure(policy, engine, prompts, config)
    if is_sound(again, config):
        cause = "stale weights: a refit removes the mismatch, so the policy changed without a refit"
    else:
        cause = "causes and fixes are listed in docs/operations.md, section 'Sampler and trainer differ'"
    return Verdict(tokens, numbers, again, (cause,))


def _measure(
    policy: Policy, engine: RolloutEngine, prompts: list[Prompt], config: RunConfig
) -> tuple[int, dict[str, float]]:
    """Sample; return the number of tokens and the mismatch."""
    samples = engine.generate(prompts, config.rollout.responses_per_prompt, config.rollout.temperature)
    batches = policy.pack(samples)
    set_logprobs(policy, [batches])
    return sum(sample.response_length for sample in samples), measure_mismatch([batches])


def is_sound(numbers: dict[str, float], config: RunConfig) -> bool:
    """Whether rounding explains the mismatch."""
    sides = (config.fp8.recipe is not None) + (config.rollout.quantization == "fp8")
    mean, kl = LIMITS["fp8" if sides else config.model.dtype]
    factor = max(1, sides)  # a KL grows as the square of d
    return numbers["logprob_diff"] <= mean * math.sqrt(factor) and numbers["kl"] <= kl * factor  # False for NaN


def action(arguments: argparse.Namespace, config: RunConfig) -> int:
    """Check the engine and print the verdict; exit code 1 on a mismatch."""
    weights = None if arguments.checkpoint is None else find_checkpoint(config, arguments.checkpoint)
    tokenizer = load_tokenizer(config.model, config.data)
    prompts = PromptStream(config.data, tokenizer, config.max_prompt_tokens).draw(config.rollout.prompts_per_step)
    with open_sampler(config, tokenizer, weights) as (policy, engine):
        verdict = check_rollout(policy, engine, prompts, config)
        if dist.get_rank() == 0:
            print(f"rollout.engine={config.rollout.engine}: {verdict}")
    return 1 if verdict.causes else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_rank("check-rollout", action, argv)


if __name__ == "__main__":
    sys.exit(main())
