"""Ranks that only sample, with vLLM: what training ranks call, and what rollout ranks do.

Messages are tuples of a name and arguments: `("refit", weight_version)`, which `weight_lanes` defines further;
`("generate", *arguments)`, `("sample_batch",)` and `("groups",)`, which are answered; `("set_stream", state)` and
`("set_groups", groups)`. After the last message comes None. Answers hold a table of the samples (`table`), whose arrays
follow through the lanes. Prompts do not travel with a batch: both roles draw them.
"""

from __future__ import annotations

import itertools
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.batch import Batch, Prompt, Sample
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data import PromptStream, SourceClass
from megatron_aspo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.journal.clock import Clock
from megatron_aspo.ranks.channel import Channel, PeerLostError
from megatron_aspo.ranks.gathering import post_phase, sum_tables
from megatron_aspo.ranks.stop_signals import StopSignals
from megatron_aspo.rewards.scoring import Reward, Scorer
from megatron_aspo.rollout.batches import sample_batch
from megatron_aspo.rollout.choice import check_engine
from megatron_aspo.rollout.partial import Pool
from megatron_aspo.rollout.table import DIFFERENT_PROMPTS, from_table, receive, send, to_table
from megatron_aspo.rollout.turns import play_turns
from megatron_aspo.rollout.vllm import VllmEngine
from megatron_aspo.rollout.weight_lanes import ReceivedWeights, WeightSender
from megatron_aspo.rollout.weight_sync import PolicyWeights

if TYPE_CHECKING:
    from megatron_aspo.policy.trainer import Policy


class RemoteEngine:
    """Samples in the rollout ranks. All training ranks make the same calls.

    The rollout ranks process messages one by one, in order. `refit` and `request_batch` do not wait for them;
    `generate` and `receive` do.
    """

    def __init__(self, policy: Policy, config: RolloutConfig, channel: Channel, tokenizer: Tokenizer) -> None:
        """Return when the rollout ranks are ready.

        Raises:
            UserError: the rollout ranks refuse the configuration.
        """
        self.channel = channel
        self.config = config
        self.tokenizer = tokenizer
        self._source = PolicyWeights(policy)
        self._sender = WeightSender(self._source, channel, config.refit_bucket_mb << 20, config.refit_checksum)
        self._sent_version: int | None = None
        self._known: dict[int, Prompt] = {}  # drawn, and in no batch yet
        self._unanswered: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        channel.receive()

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        """See `RolloutEngine.generate`. Batches requested earlier are sampled first."""
        known = {prompt.id: prompt for prompt in prompts}
        if not self.config.environment:  # only their tokens are sampled from
            prompts = [replace(prompt, text="", entry={}) for prompt in prompts]
        arguments = prompts, responses_per_prompt, temperature, first_group
        return self.receive(self._request(lambda: self._read(self.channel.receive(), known), "generate", *arguments))

    def refit(self) -> None:
        """Send the policy's current weights, for all requests that follow; nothing if they were sent last. Collective.

        Raises:
            WeightSyncError, PeerLostError: see `WeightSender.send`.
        """
        if self._source.weight_version != self._sent_version:
            self._sent_version = self._source.weight_version
            self._sender.send()

    def sleep(self) -> None:
        """No-op: the rollout ranks do not share the policy's memory."""

    def set_stream(self, prompts: PromptStream, state: dict[str, Any], groups: dict[str, Any] | None = None) -> None:
        """Continue the batches' prompts from a state of the prompt stream, and with the groups in progress there."""
        self._prompts, self._drawn = prompts, state
        self.channel.send(("set_stream", state))
        if groups:
            self._known = {group.prompt.id: group.prompt for group in groups["groups"]}
            self.channel.send(("set_groups", groups))

    def groups(self) -> dict[str, Any]:
        """The groups that are in progress after the batches requested earlier, on rank 0; elsewhere {}."""
        return self.receive(self._request(lambda: self.channel.receive(everywhere=False) or {}, "groups"))

    def request_batch(self) -> Future[Batch]:
        """Have the next batch sampled with the weights of the last `refit`; pass the result to `receive`."""
        return self._request(self._read_batch, "sample_batch")

    def receive[T](self, answer: Future[T]) -> T:
        """Wait for an answer. Answers come in the order of their requests."""
        while not answer.done():
            first, read = self._unanswered.popleft()
            first.set_result(read())
        return answer.result()

    def _request(self, read: Callable[[], Any], name: str, *arguments: Any) -> Future[Any]:
        """Send a request, whose answer `read` receives and turns into the result."""
        self.channel.send((name, *arguments))
        self._unanswered.append((Future(), read))
        return self._unanswered[-1][0]

    def _read(self, table: Tensor, prompts: Mapping[int, Prompt]) -> list[Sample]:
        return receive(self.channel.lanes, from_table(table, prompts), self.tokenizer)

    def _read_batch(self) -> Batch:
        batch, sizes, table, in_progress, stopping = self.channel.receive()
        if stopping:  # here they have the meaning that they have on a training rank that gets one itself
            signal.raise_signal(signal.SIGUSR1)
        self._known |= self._draw(batch.prompts)
        samples = iter(self._read(table, self._known))
        self._known = {number: self._known[number] for number in in_progress}
        return replace(batch, groups=[list(itertools.islice(samples, size)) for size in sizes])

    def _draw(self, behind: dict[str, Any]) -> dict[int, Prompt]:
        """Draw the prompts up to a state of the stream, and leave the stream as it is.

        Raises:
            RunError: the stream does not come to the state.
        """
        current, drawn = self._prompts.state_dict(), dict[int, Prompt]()
        self._prompts.load_state_dict(self._drawn)
        while sum(self._prompts.state_dict()["positions"]) < sum(behind["positions"]):
            drawn |= {prompt.id: prompt for prompt in self._prompts.draw(1)}
        self._drawn = self._prompts.state_dict()
        self._prompts.load_state_dict(current)
        if self._drawn != behind:
            raise RunError(DIFFERENT_PROMPTS)
        return drawn


def update_in_flight(channel: Channel, weights: ReceivedWeights, engine: VllmEngine, is_sampling: bool) -> bool:
    """Load new weights if they are the next message and all rollout ranks have staged their parts. Collective over the
    rollout ranks, whose replicas may have taken different numbers of steps.

    Args:
        is_sampling: whether this replica has requests left.

    Returns:
        Whether any replica has.
    """
    message = channel.peek() if dist.get_rank() == 0 else None
    is_ready = weights.is_staged and (dist.get_rank() > 0 or (message or [None])[0] == "refit")
    sampling, unready = sum_tables(torch.tensor([is_sampling, not is_ready], dtype=torch.int64)).tolist()
    if not unready:
        _, weights.weight_version = channel.receive()
        engine.refit()
    return sampling > 0


def serve(
    config: RunConfig,
    channel: Channel,
    reward: Reward | None = None,
    source: SourceClass | None = None,
    stop: StopSignals | None = None,
) -> None:
    """Process the training ranks' messages in order until they are done.

    Args:
        reward, source: as in `train`.
        stop: a signal that a rollout rank receives is raised on the training ranks with the next batch.

    Raises:
        UserError, RunError: the rollout failed; the training ranks raise the same error.
        PeerLostError: the training ranks have ended unexpectedly.
    """
    try:
        check_engine(config.rollout, config.reward)
        tokenizer = load_tokenizer(config.model, config.data)
        prompts = PromptStream(config.data, tokenizer, config.max_prompt_tokens, source)
        weights = ReceivedWeights(channel, config.rollout.refit_checksum)
        # Reward functions run in forks of this process, which are made before it has an engine.
        with Scorer(config.data, config.reward, config.rollout, reward) as scorer:
            routes = config.train.router_replay == "sampler"
            engine = VllmEngine(weights, config.model, config.rollout, tokenizer, config.seed, routes=routes)
            play_turns(engine, config)
            update = partial(update_in_flight, channel, weights, engine) if config.rollout.in_flight else None
            pool = Pool(engine, config.rollout) if config.rollout.oversample > 1 else None
            channel.send("ready")
            while (message := channel.receive()) is not None:
                match message:
                    case "refit", weight_version:
                        post_phase("refit")
                        weights.weight_version = weight_version
                        engine.refit()
                    case "generate", *arguments:
                        post_phase("rollout")
                        samples = engine.generate(*arguments)
                        channel.send(to_table(samples))
                        send(channel.lanes, samples)
                    case "set_stream", state:
                        prompts.load_state_dict(state)
                    case ("set_groups", _) if pool is not None:
                        pool.load_state_dict(message[1])  # a name would keep the other replicas' responses for good
                    case ("groups",) if pool is not None:
                        channel.send(pool.state_dict())
                    case ("sample_batch",):
                        clock = Clock()
                        engine.between_steps = update
                        batch = sample_batch(engine, prompts, scorer, config.rollout, clock, pool)
                        engine.between_steps = None
                        batch.metrics |= {f"time/remote_{part}": clock[part] for part in ("rollout", "reward")}
                        samples = [sample for group in batch.groups for sample in group]
                        sizes = [len(group) for group in batch.groups]
                        in_progress = [group.prompt.id for group in pool.groups] if pool else []
                        stopping = stop is not None and stop.requested()
                        channel.send((replace(batch, groups=[]), sizes, to_table(samples), in_progress, stopping))
                        send(channel.lanes, samples)
            weights.close()
    except PeerLostError:
        raise
    except (UserError, RunError) as error:
        channel.fail(error)
        raise
