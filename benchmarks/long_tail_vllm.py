"""Counts of vLLM's steps with responses of very unequal lengths: exact batches, partial rollouts, updates in flight.

`python benchmarks/long_tail_vllm.py` prints a table. A tiny model with random weights writes; each response ends at a
length drawn from a log-normal distribution. Counts do not depend on the machine.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.engine import Enough, Request, Response
from megatron_aspo.rollout.partial import Pool
from megatron_aspo.rollout.vllm import VllmEngine
from megatron_aspo.rollout.weight_sync import PolicyWeights

MEDIAN, SIGMA, CAP = 32, 1.0, 256
GROUPS, SIZE = 8, 4
SLOTS = GROUPS * SIZE
WARM, BATCHES = 4, 16
TRAINING = 48
"""Engine steps that the training of a batch takes."""

MODES: dict[str, tuple[float, bool, bool]] = {
    "colocated": (1.0, False, False),
    "colocated, `oversample=1.25`": (1.25, False, False),
    "colocated, `oversample=1.5`": (1.5, False, False),
    "colocated, `oversample=2`": (2.0, False, False),
    "separate, `max_staleness=1`": (1.0, True, False),
    "separate, `max_staleness=1 in_flight=true`": (1.0, True, True),
    "separate, `max_staleness=1 in_flight=true oversample=1.5`": (1.5, True, True),
}
"""Groups in progress for each of a batch; whether a batch is sampled while the one before is trained on; whether the
weights of that training arrive in flight."""


class Prompts:
    position = 0

    def draw(self, count: int) -> list[Prompt]:
        self.position += count
        return [Prompt(i, "", (1 + i % 100, 2, 3), {}) for i in range(self.position - count, self.position)]


def length(request: Request) -> int:
    """Tokens of a response, from its prompt and number alone."""
    draw = np.random.default_rng([request.prompt.id, request.replica]).normal()
    return max(1, min(CAP, round(MEDIAN * float(np.exp(SIGMA * draw)))))


class CountedEngine(VllmEngine):
    """Ends responses at their drawn lengths, and counts."""

    counts: Counter[str]
    steps_of_batch = 0

    def advance(self, requests: Sequence[Request], temperature: float, enough: Enough | None = None) -> list[Response]:
        engine: Any = self._llm.llm_engine
        add, step, scheduler = engine.add_request, engine.step, engine.engine_core.engine_core.scheduler

        def add_with_length(name: str, prompt: Any, params: Any) -> None:
            request = requests[int(name)]
            params.max_tokens = length(request) - len(request.written)
            params.stop_token_ids = []
            self.counts["prefilled again"] += len(request.written)
            add(name, prompt, params)

        def counted_step() -> Any:
            outputs = step()
            self.counts["steps"] += 1
            self.steps_of_batch += 1
            self.counts["slots"] += sum(output.finished for output in outputs) + len(scheduler.running)
            return outputs

        engine.add_request, engine.step = add_with_length, counted_step
        try:
            return super().advance(requests, temperature, enough)
        finally:
            engine.add_request, engine.step = add, step


def sample(engine: CountedEngine, config: RolloutConfig, is_ahead: bool, in_flight: bool) -> tuple[Counter[str], float]:
    """Counts over the batches after the warm-up, and the mean age of their tokens in steps when they are trained on."""
    pool: Any = Pool(engine, config) if config.oversample > 1 else None
    prompts: Any = Prompts()

    def between_steps(is_sampling: bool) -> bool:
        if engine.steps_of_batch >= TRAINING:  # the weights stay the same, only their version is new
            source.policy.weight_version = engine.weight_version = start + batch + 1
        return is_sampling

    engine.between_steps = between_steps if in_flight else None
    source: Any = engine.source
    ages: list[float] = []
    start = source.policy.weight_version
    for batch in range(BATCHES):
        engine.steps_of_batch = 0
        if batch == WARM:
            engine.counts = Counter()
        source.policy.weight_version = engine.weight_version = start + batch
        samples: list[Sample] = (
            pool.sample(prompts, GROUPS, 0) if pool else engine.generate(prompts.draw(GROUPS), SIZE, 1)
        )
        if pool:
            pool.batch += 1
        if batch >= WARM:
            engine.counts["tokens"] += sum(sample.response_length for sample in samples)
            ages += [
                float(start + batch + is_ahead - (sample.weight_version if sample.versions is None else version))
                for sample in samples
                for version in (range(1) if sample.versions is None else sample.versions)
                for _ in range(sample.response_length if sample.versions is None else 1)
            ]
    return engine.counts, float(np.mean(ages))


def main() -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}.items():
        os.environ.setdefault(name, value)
    model = ModelConfig(hidden_size=64, ffn_hidden_size=96, num_attention_heads=2, max_sequence_length=272)
    base: dict[str, Any] = {"prompts_per_step": GROUPS, "responses_per_prompt": SIZE, "max_response_tokens": CAP}
    base |= {"engine": "vllm", "batch_size": SLOTS, "kv_cache_gb": 0.1}
    train = TrainConfig(mini_batch_prompts=GROUPS, max_tokens_per_micro_batch=512)
    config = RunConfig("long-tail", model=model, rollout=RolloutConfig(**base), train=train)
    print("| mode | steps of a batch | slots in use | tokens a step | prefilled again, of the tokens | age in steps |")
    print("|---|---:|---:|---:|---:|---:|")
    with distributed(config):
        policy = Policy(config, AsciiTokenizer.vocab_size)
        engine = CountedEngine(PolicyWeights(policy), model, config.rollout, AsciiTokenizer(), seed=1)
        engine.refit()
        for mode, (oversample, is_ahead, in_flight) in MODES.items():
            engine.counts = Counter()
            more = {"oversample": oversample, "max_age": 4} if oversample > 1 else {}
            counts, age = sample(engine, RolloutConfig(**base, **more), is_ahead, in_flight)
            steps, tokens = counts["steps"], counts["tokens"]
            again = counts["prefilled again"] / tokens
            shown = f"{steps / (BATCHES - WARM):.0f} | {counts['slots'] / steps / SLOTS:.0%} | {tokens / steps:.1f}"
            print(f"| {mode} | {shown} | {again:.0%} | {age:.2f} |", flush=True)


if __name__ == "__main__":
    main()
