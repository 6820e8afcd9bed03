"""Data that the parts of the loop exchange: prompts, samples, batches, micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the loss library must import with torch alone installed
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A problem as the policy sees it, with the data that its verifier needs.

    Attributes:
        id: unique position in the prompt stream; negative for held-out prompts.
        entry: the problem's row, for the verifier.
        verifier: name of the verifier (`SourceConfig.reward`).
        data_source: origin of the problem, for messages.
    """

    id: int
    text: str
    token_ids: tuple[int, ...]
    entry: dict[str, Any]
    verifier: str = "reasoning_gym"
    data_source: str = ""


EVERY_RANK = -1
"""Owner of a sample whose arrays all ranks have."""

OBSERVATION = -1
"""In `Sample.versions`: a token that an environment wrote, not the policy (`rollout.environment`)."""


@dataclass
class Sample:
    """A prompt with one response. Per-token arrays have one entry per response token.

    The rank `owner` has the arrays and the text. A rank that trains on the sample gets the arrays; elsewhere they are
    empty, with their last dimensions. All other fields are the same on every rank.

    Attributes:
        group: index of the prompt group in the batch; advantages are relative to the group.
        token_ids: int32; tuples are converted.
        weight_version: of the oldest weights that wrote a part of the response: optimizer updates that they have taken.
        rollout_logprobs: of the distribution that the engine sampled from.
        versions: of the weights that wrote each token, int32, or `OBSERVATION`; None: all tokens are of
            `weight_version`.
        routes: experts that the sampler chose for each token before the last, prompt included, [length - 1, layers,
            top k]; None where they are not replayed.
        score: the verifier's, from 0 to 1; 1 is a correct answer.
        reward: score less the length penalty; the quantity that the policy maximises.
        unjudged: reason why the verifier reached no verdict; empty if it did. Group statistics, loss and reward metrics
            leave out such a response.
        repetition, repetition_words: share of n-grams that occurred earlier in the response (`rewards.repetition`).
        metrics: further numbers of the verifier (`Verdict.metrics`).
        environment_score: score that the environment gave, inf if it took too long, -inf if it raised an OSError; None:
            the verifier judges.
        response_length: tokens of the response, known on every rank, as the next two are.
        written_length: those that the policy wrote.
        turns: parts that the policy wrote, with observations between them.
        owner: the rank that has the arrays, or `EVERY_RANK`.
    """

    prompt: Prompt
    group: int
    token_ids: npt.NDArray[np.int32]
    finish_reason: Literal["stop", "length"]
    weight_version: int = 0
    rollout_logprobs: npt.NDArray[np.float32] | None = None
    text: str = ""
    score: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    unjudged: str = ""
    repetition: float = 0.0
    repetition_words: float = 0.0
    versions: npt.NDArray[np.int32] | None = None
    routes: npt.NDArray[np.uint8] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    environment_score: float | None = None
    response_length: int = -1
    written_length: int = -1
    turns: int = 1
    owner: int = EVERY_RANK

    def __post_init__(self) -> None:
        import numpy as np  # the loss library must import with torch alone installed

        self.token_ids = np.asarray(self.token_ids, dtype=np.int32)
        if len(self.token_ids) or self.response_length < 0:
            self.response_length = self.written_length = len(self.token_ids)
            if self.versions is not None and len(self.versions):
                by_policy = self.versions >= 0
                self.written_length = int(by_policy.sum())
                self.turns = int(by_policy[0]) + int((by_policy[1:] > by_policy[:-1]).sum())
        if self.written_length < 0:
            self.written_length = self.response_length

    @property
    def written(self) -> npt.NDArray[np.int32]:
        """The tokens that the policy wrote, where the arrays are."""
        return self.token_ids if self.versions is None else self.token_ids[self.versions >= 0]

    @property
    def length(self) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompt.token_ids) + self.response_length


@dataclass
class Batch:
    """The responses that one step trains on.

    Attributes:
        groups: scored samples with advantages, one list per prompt; fewer than `rollout.prompts_per_step` where groups
            had no signal.
        metrics: rollout metrics for the log.
        prompts: state of the prompt stream behind the batch.
        started, ended: unix seconds of the sampling.
        weight_version: of the oldest weights that wrote a part of it: optimizer updates that they have taken.
    """

    groups: list[list[Sample]]
    metrics: dict[str, float]
    prompts: dict[str, Any]
    started: float
    ended: float
    weight_version: int = 0


@dataclass
class MicroBatch:
    """A packed stream of T tokens (THD layout). Per-token tensors are [T] and already shifted.

    Position t holds input token t; `labels[t]` is the token to predict, and `loss_mask`, `advantages` and all log-probs
    at t refer to that label. The last position of a sample and all padding are masked. Under context parallelism the
    per-token tensors are this rank's shard of the stream, [T / context] (`packing.stream_part`), while `cu_seqlens`,
    `max_seqlen` and `samples` describe the whole stream.

    Attributes:
        old_logprobs, ref_logprobs: the trainer's, computed before the step's first update, on the last pipeline stage.
            `old_logprobs=None` stands for the current policy, so that all ratios are 1.
        weight_versions: int32, of the weights that wrote each label.
        loss_positions: [n] int64, positions with `loss_mask` set, ascending.
        cu_seqlens: [n + 1] int32, bounds of the segments. Padding is the last segment; under context parallelism every
            segment also ends in padding.
        max_seqlen: length of the longest segment.
        sequence_ids: segment of each position, numbered alike on all ranks that hold a shard of it.
        samples: index in the mini-batch of each segment's sample; the padding segment has none.
        routing: with `train.router_replay`, each token's experts for every MoE layer of this pipeline stage, [tokens of
            this rank, moe_top_k]. int16 recorded by the pass for `old_logprobs`, or uint8 of the sampler.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    loss_positions: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor | None
    sequence_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    samples: tuple[int, ...]
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    weight_versions: Tensor | None = None
    routing: list[Tensor] | None = None
