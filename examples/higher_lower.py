"""A game of several turns that a tiny model learns on two cores: guess a number from 1 to 7 with three tries.

    .venv/bin/python examples/higher_lower.py [STEPS]

After a wrong guess the environment writes < or >. Who does not read it finds 3 of 7 numbers, a binary search all.
"""

import random
import sys

from megatron_aspo.batch import Prompt
from megatron_aspo.commands.train import run
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig
from megatron_aspo.data import Problem


class HigherLower:
    """A turn ends with a digit, the guess. The number scores 1; a tenth of it for each other guess shows the way."""

    def reset(self, prompt: Prompt) -> None:
        self.number, self.score = prompt.entry["answer"], 0.0

    def step(self, response: str) -> str | None:
        if not response[-1:].isdigit():  # the end token
            return None
        guess = int(response[-1])
        self.score = 1.0 if guess == self.number else self.score + 0.1
        return None if guess == self.number else "<" if self.number < guess else ">"


def no_guess(response: str, row: dict) -> float:
    """The environment scores all games; a score of its own would be the place for a judge of the last answer."""
    return 0.0


class Games:
    """The prompts name a game; the numbers are hidden."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def problem(self, position: int) -> Problem:
        draw = random.Random(f"{self.seed} {position}")
        text = f"{draw.randrange(10**6):06d}"
        return Problem(content=f"{text}:", fields={}, entry={"answer": draw.randint(1, 7)}, data_source="games")


def configuration(steps: int) -> RunConfig:
    return RunConfig(
        name="higher_lower",
        model=ModelConfig(hidden_size=64, ffn_hidden_size=128, max_sequence_length=20),
        data=DataConfig(eval_prompts=70),
        rollout=RolloutConfig(
            environment="higher_lower:HigherLower",
            max_turns=3,
            max_response_tokens=10,
            stop=tuple("1234567"),
            prompts_per_step=32,
            responses_per_prompt=16,
            dynamic_sampling=False,
        ),
        optimizer=OptimizerConfig(lr=2e-3, lr_warmup_updates=10, weight_decay=0.0),
        train=TrainConfig(steps=steps, mini_batch_prompts=16, epochs=2),
        checkpoint=CheckpointConfig(every=0),
        eval=EvalConfig(every=20, responses_per_prompt=4),
    )


if __name__ == "__main__":
    from megatron_aspo.tools.report import write_report

    config = configuration(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
    run(config, prompts=Games, reward=no_guess, report=write_report)
