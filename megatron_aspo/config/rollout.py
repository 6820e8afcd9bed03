"""Settings of response sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megatron_aspo.config.fields import SETTINGS, Name, Text
from megatron_aspo.config.rules import require, require_known

ENGINES = ("megatron", "vllm")
"""Built-in rollout engines. Any other is named by its import path, module:class."""

ADVANTAGES = ("grpo", "no_std", "rloo", "reinforce++", "reinforce++_baseline", "maxrl")
"""Built-in advantages: the keys of `ADVANTAGES` in `megatron_aspo.rollout.advantages`."""

ENVIRONMENTS = ("python", "retry", "sokoban")
"""Built-in environments. Any other is named by its import path, module:class."""

_VLLM_ONLY = {"top_k": 0, "tensor": 1, "request_seeds": True, "ranks": 0, "quantization": "none"}


@dataclass(frozen=True, config=SETTINGS)
class RolloutConfig:
    """How responses are sampled from the policy."""

    engine: Text = "megatron"
    """"megatron" samples from the training model itself. "vllm" samples with vLLM, in the training ranks or in ranks of
    its own. `module:class` is a custom engine (docs/extending.md)."""
    prompts_per_step: PositiveInt = 32
    """Prompt groups of one training step."""
    responses_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Group size G."""
    advantage: Text = "grpo"
    """How rewards become advantages (docs/rewards.md): one of `ADVANTAGES`, or `module:function`."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The trainer computes log-probs at the same temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Log-probs are of the full distribution, with vLLM of the nucleus."""
    top_k: NonNegativeInt = 0
    """Sample from this many most likely tokens; 0 is all of them. vLLM only."""
    stop: tuple[Name, ...] = ()
    """Strings that end a response (they are kept in it), besides the end-of-sequence token."""
    max_response_tokens: PositiveInt = 16
    """Longest response. A response cut there has finish_reason "length"."""
    dynamic_sampling: bool = True
    """Drop groups whose scores are all equal, and refill. A length penalty alone does not keep a group."""
    max_rounds: PositiveInt = 4
    """Most generation rounds of a step for refilling dropped groups."""
    environment: Text = ""
    """Environment that answers a turn, so that the response goes on: "python" runs blocks of Python, "retry" reports
    that an answer to a reasoning-gym task is wrong, "sokoban" plays that task move by move, `module:Class` is your own
    (docs/extending.md). Empty: one turn."""
    max_turns: PositiveInt = 8
    """With `environment`: most turns of a response. `max_response_tokens` bounds all, observations included."""
    environment_seconds: PositiveFloat = 60.0
    """Wall-clock limit of an environment's answer. A response whose environment takes longer has no verdict."""
    batch_size: PositiveInt = 512
    """Responses decoded at once on a rank."""
    tensor: PositiveInt = 1
    """Consecutive ranks that share one copy of vLLM's weights. This and all settings below are for vLLM."""
    kv_cache_gb: PositiveFloat = 1.0
    """GiB per rank for vLLM's keys and values."""
    sleep_level: Annotated[int, Field(ge=0, le=2)] = 2
    """GPU memory that vLLM frees in training: 0 none, 1 keys and values (weights move to the host), 2 weights too."""
    request_seeds: bool = True
    """Seed every request from `seed`, its prompt and its number. A response is then independent of layout and batch,
    and a resumed run repeats bit by bit; vLLM keeps a generator for each request. False: the requests of a replica
    share a generator, seeded at each call from `seed`, the weights' version and the first prompt."""
    refit_bucket_mb: PositiveInt = 512
    """MiB of weights per transfer from the policy to vLLM."""
    refit_checksum: bool = False
    """Compare checksums of the weights at every refit: over all ranks, between both sides of a channel, and with
    vLLM's own copies if these are not packed or split."""
    quantization: Literal["none", "fp8"] = "none"
    """"fp8": vLLM's linear layers in FP8 (E4M3), with one scale per output channel of a weight, computed at each refit,
    and one per token. Needs model.dtype=bfloat16; slow on a CPU."""
    ranks: NonNegativeInt = 0
    """Ranks that only generate, the last ones of the launcher; the others train. 0: all ranks alternate."""
    max_staleness: NonNegativeInt = 0
    """Batches generated ahead, with `ranks` during training. The batch of step n is generated with the weights after
    step n - 1 - max_staleness (the initial weights if that is negative). Without `ranks` this saves no time, and shows
    what staleness does to training."""
    oversample: Annotated[float, Field(ge=1)] = 1.0
    """Prompt groups in progress for each of `prompts_per_step`. Above 1 a batch ends when enough groups are complete;
    the others go on in the next step, after their tokens so far, with its weights. 1: every batch is of one policy."""
    max_age: PositiveInt = 4
    """With `oversample`: a batch does not end before the responses that began this many steps earlier have ended."""
    in_flight: bool = False
    """With `max_staleness`: load new weights between two tokens of running responses, which keep their keys and values.
    A run is then not repeatable to the bit."""

    def __post_init__(self) -> None:
        require_known("engine", self.engine, ENGINES)
        require_known("advantage", self.advantage, ADVANTAGES)
        for name, off in () if self.engine == "vllm" else _VLLM_ONLY.items():
            value = getattr(self, name)
            require(value == off, f"{name}={value} is for vLLM; set rollout.engine=vllm, or {name}={off}")
        ranks, stale = self.ranks, self.max_staleness
        require(ranks % self.tensor == 0, f"ranks={ranks} is not a multiple of tensor={self.tensor}; make it one")
        ahead = "in_flight=true needs ranks that generate ahead; set rollout.ranks and rollout.max_staleness=1"
        require(not self.in_flight or (ranks > 0 and stale > 0), ahead)
        partial = self.oversample > 1
        both = f"max_staleness={stale} and oversample={self.oversample:g} together need rollout.ranks; change one"
        require(not (stale and partial) or ranks > 0, both)
        own = f"oversample={self.oversample:g} needs an engine that continues responses; set engine=vllm or megatron"
        require(not partial or self.engine in ENGINES, own)
        if self.environment:
            require_known("environment", self.environment, ENVIRONMENTS)
            own = f"environment={self.environment} needs engine=vllm or megatron, which continue responses; set one"
            require(self.engine in ENGINES, own)
            require(not self.in_flight, "in_flight=true cannot be combined with environment; set in_flight=false")
        aimless = f"max_age={self.max_age} is for unfinished responses; set oversample above 1, or max_age=4"
        require(partial or self.max_age == 4, aimless)
