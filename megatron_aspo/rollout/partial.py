"""Partial rollouts: a batch ends when enough groups are complete, and the others go on in the next step.

A group belongs to one replica, which ends its part of the batch by itself: when its share of groups is complete and
no response is older than `rollout.max_age`. The end does not depend on the speed of replicas, so a run is repeatable
to the bit. Complete groups are taken in the order of their start, at most `steps_behind` batches after it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.errors import UserError
from megatron_aspo.ranks.exchange import gather_on_rank_0
from megatron_aspo.ranks.gathering import sum_tables
from megatron_aspo.rollout.engine import NOTHING, Request, Response
from megatron_aspo.rollout.table import share

if TYPE_CHECKING:
    from megatron_aspo.data import PromptStream


@dataclass(frozen=True)
class Group:
    """A prompt whose responses are in progress.

    Attributes:
        replica: number of the replica that samples it.
        started: number of the batch in which it began.
        responses: whole or unfinished; none on the ranks of other replicas.
    """

    prompt: Prompt
    replica: int
    started: int
    responses: list[Response]


def steps_behind(config: RolloutConfig, resumed: int = 0) -> int:
    """Most batches between the one in which a response begins and the one that has it.

    A response ends within `max_age` batches. Then it waits for groups that began before it, which are fewer than
    `oversample` batches.

    Args:
        resumed: groups in progress of a checkpoint. A run with larger batches may have left more than this one starts.
    """
    waiting = math.ceil(resumed / config.prompts_per_step)
    return config.max_age + math.ceil(config.oversample) - 1 + waiting if config.oversample > 1 else 0


class Pool:
    """The groups in progress, in the order of their start. All ranks make the same calls and know all groups.

    Args:
        engine: one of the package's own. Its `writers` are the ranks that have what each replica of the sampler writes;
            `replica` is this rank's, and `spread` is that of `share`.

    Raises:
        UserError: there are more replicas than groups in a batch.
    """

    def __init__(self, engine: Any, config: RolloutConfig) -> None:
        self.engine, self.config = engine, config
        self.batch = 0
        self.groups: list[Group] = []
        self._replicas = len(engine.writers)
        if self._replicas > config.prompts_per_step:
            raise UserError(
                f"rollout.oversample={config.oversample:g} gives whole groups to {self._replicas} replicas of the "
                f"sampler, more than rollout.prompts_per_step={config.prompts_per_step}; raise it, or rollout.tensor"
            )

    def sample(self, prompts: PromptStream, count: int, first_group: int) -> list[Sample]:
        """Start new groups in place of those taken last, sample until `count` are complete, and take these. Returns
        their samples as `RolloutEngine.generate` does. Collective."""
        engine, size = self.engine, self.config.responses_per_prompt
        for replica in range(self._replicas):
            room = math.ceil(self.config.oversample * self._part(replica, self.config.prompts_per_step))
            room -= sum(group.replica == replica for group in self.groups)
            for prompt in prompts.draw(max(room, 0)):
                responses = [NOTHING] * size if replica == engine.replica else []
                self.groups.append(Group(prompt, replica, self.batch, responses))
        own = [i for i, group in enumerate(self.groups) if group.replica == engine.replica]
        wanted = self._part(engine.replica, count)
        self._advance([self.groups[i] for i in own], wanted)
        complete = [i for i in own if all(response.finish_reason for response in self.groups[i].responses)][:wanted]

        taken = torch.zeros(count, dtype=torch.int64)
        if _rank() == engine.writers[engine.replica][0]:
            taken[engine.replica :: self._replicas] = torch.tensor(complete)
        indices: list[int] = sum_tables(taken).tolist()
        chosen = [self.groups[i] for i in indices]
        requests = [
            Request(g * size + k, group.prompt, first_group + g, k)
            for g, group in enumerate(chosen)
            for k in range(size)
        ]
        writers = [engine.writers[group.replica] for group in chosen]
        owners = [ranks[k % len(ranks)] for ranks in writers for k in range(size)]
        written = [
            (requests[g * size + k], response)
            for g, group in enumerate(chosen)
            for k, response in enumerate(group.responses)
        ]
        self.groups = [group for i, group in enumerate(self.groups) if i not in indices]
        return share(requests, owners, written, engine.tokenizer, engine.spread)

    def _part(self, replica: int, count: int) -> int:
        """A replica's part of `count` groups."""
        return len(range(replica, count, self._replicas))

    def _advance(self, groups: Sequence[Group], wanted: int) -> None:
        """Sample until `wanted` of this replica's groups are complete, and all that have reached `max_age`."""
        places = [
            (g, k) for g, group in enumerate(groups) for k, r in enumerate(group.responses) if not r.finish_reason
        ]
        requests = [Request(i, groups[g].prompt, 0, k, groups[g].responses[k]) for i, (g, k) in enumerate(places)]

        def enough(ended: Collection[int]) -> bool:
            running = {g for i, (g, _) in enumerate(places) if i not in ended}
            due = any(self.batch - groups[g].started >= self.config.max_age for g in running)
            return len(groups) - len(running) >= wanted and not due

        # Called even without requests: with `in_flight` all replicas load new weights together.
        engine = self.engine.turns or self.engine
        responses = engine.advance([] if enough(()) else requests, self.config.temperature, enough)
        for (g, k), response in zip(places, responses, strict=False):
            groups[g].responses[k] = response

    def state_dict(self) -> dict[str, Any]:
        """The groups with their responses, on rank 0; elsewhere without. Collective."""
        writes = _rank() == self.engine.writers[self.engine.replica][0]
        own = {i: group.responses for i, group in enumerate(self.groups) if group.responses} if writes else {}
        responses = gather_on_rank_0(own)
        groups = [replace(group, responses=responses.get(i, [])) for i, group in enumerate(self.groups)]
        return {"batch": self.batch, "replicas": self._replicas, "groups": groups, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the groups of a checkpoint. With another number of replicas they are dealt out anew.

        Raises:
            UserError: they were begun with other settings.
        """
        for name, value in self._settings().items():
            if state[name] != value:
                raise UserError(
                    f"the checkpoint has {len(state['groups'])} unfinished groups with rollout.{name}={state[name]}, "
                    f"here {value}; continue with the former"
                )
        self.batch, self.groups = state["batch"], []
        for i, group in enumerate(state["groups"]):
            replica = group.replica if state["replicas"] == self._replicas else i % self._replicas
            responses = group.responses if replica == self.engine.replica else []
            self.groups.append(replace(group, replica=replica, responses=responses))

    def _settings(self) -> dict[str, int]:
        config = self.config
        return {name: getattr(config, name) for name in ("responses_per_prompt", "max_response_tokens")}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
