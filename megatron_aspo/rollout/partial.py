"""Partial rollouts: a batch ends when enough groups are complete, and the others go on in the next step.

A group belongs to one replica, which ends its part of the batch by itself: when its share of groups is complete and
no response is older than `rollout.max_age`. The end does not depend on the speed of replicas, so a run is repeatable
to the bit. Complete groups are taken in the order of their start, at most `steps_behind` batches after it.
"""

from __future__ import annotations

import math
from collections import Counter
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


def steps_behind(config: RolloutConfig, resumed: dict[str, Any] | None = None, replicas: int = 1) -> int:
    """Most batches between the one in which a response begins and the one that has it.

    A response ends within `max_age` batches. Then it waits for groups that began before it, which are fewer than
    `oversample` batches.

    Args:
        resumed: groups in progress of a checkpoint. A run with larger batches may have left more than this one starts.
        replicas: of the sampler. Each takes its own groups, in its part of every batch.
    """
    if config.oversample == 1:
        return 0
    left = Counter(_dealt_out(resumed, replicas) if resumed else ())
    parts = {replica: _part(replica, config.prompts_per_step, replicas) for replica in left}
    waiting = max((math.ceil(count / parts[replica]) for replica, count in left.items()), default=0)
    return config.max_age + math.ceil(config.oversample) - 1 + waiting


class Pool:
    """The groups in progress, in the order of their start. All ranks make the same calls and know all groups.

    Args:
        engine: one of the package's own. Its `writers` are the ranks that have what each replica of the sampler writes;
            `replica` is this rank's, and `spread` is that of `share`.

    Attributes:
        batch: number of the current batch.
        written: tokens that the policy has written on all replicas since this pool began.

    Raises:
        UserError: there are more replicas than groups in a batch.
    """

    def __init__(self, engine: Any, config: RolloutConfig) -> None:
        self.engine, self.config = engine, config
        self.batch = self.written = 0
        self.groups: list[Group] = []
        self.replicas = len(engine.writers)
        if self.replicas > config.prompts_per_step:
            raise UserError(
                f"rollout.oversample={config.oversample:g} gives whole groups to {self.replicas} replicas of the "
                f"sampler, more than rollout.prompts_per_step={config.prompts_per_step}; raise it, or rollout.tensor"
            )

    def sample(self, prompts: PromptStream, count: int, first_group: int) -> list[Sample]:
        """Start new groups in place of those taken last, sample until `count` are complete, and take these. Returns
        their samples as `RolloutEngine.generate` does. Collective."""
        engine, size = self.engine, self.config.responses_per_prompt
        for replica in range(self.replicas):
            room = math.ceil(self.config.oversample * _part(replica, self.config.prompts_per_step, self.replicas))
            room -= sum(group.replica == replica for group in self.groups)
            for prompt in prompts.draw(max(room, 0)):
                responses = [NOTHING] * size if replica == engine.replica else []
                self.groups.append(Group(prompt, replica, self.batch, responses))
        own = [i for i, group in enumerate(self.groups) if group.replica == engine.replica]
        wanted = _part(engine.replica, count, self.replicas)
        written = self._advance([self.groups[i] for i in own], wanted)
        complete = [i for i in own if all(response.finish_reason for response in self.groups[i].responses)][:wanted]

        table = torch.zeros(count + 1, dtype=torch.int64)
        if _rank() == engine.writers[engine.replica][0]:
            table[:count][engine.replica :: self.replicas] = torch.tensor(complete)
            table[count] = written
        *indices, total = sum_tables(table).tolist()
        self.written += total
        chosen = [self.groups[i] for i in indices]
        requests = [
            Request(g * size + k, group.prompt, first_group + g, k)
            for g, group in enumerate(chosen)
            for k in range(size)
        ]
        writers = [engine.writers[group.replica] for group in chosen]
        owners = [ranks[k % len(ranks)] for ranks in writers for k in range(size)]
        responses = [
            (requests[g * size + k], response)
            for g, group in enumerate(chosen)
            for k, response in enumerate(group.responses)
        ]
        self.groups = [group for i, group in enumerate(self.groups) if i not in indices]
        return share(requests, owners, responses, engine.tokenizer, engine.spread)

    def _advance(self, groups: Sequence[Group], wanted: int) -> int:
        """Sample until `wanted` of this replica's groups are complete, and all that have reached `max_age`. Returns the
        number of tokens written."""
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
        written = 0
        for (g, k), response in zip(places, responses, strict=False):
            written += response.written_length - groups[g].responses[k].written_length
            groups[g].responses[k] = response
        return written

    def state_dict(self) -> dict[str, Any]:
        """The groups with their responses, on rank 0; elsewhere without. Collective."""
        writes = _rank() == self.engine.writers[self.engine.replica][0]
        own = {i: group.responses for i, group in enumerate(self.groups) if group.responses} if writes else {}
        responses = gather_on_rank_0(own)
        groups = [replace(group, responses=responses.get(i, [])) for i, group in enumerate(self.groups)]
        return {"batch": self.batch, "replicas": self.replicas, "groups": groups, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the groups of a checkpoint. With another number of replicas they are dealt out anew.

        Raises:
            UserError: they were begun with other settings.
        """
        for name, value in self._settings().items():
            if state[name] != value:
                raise UserError(
                    f"the checkpoint has {len(state['groups'])} unfinished groups with rollout.{name}={state[name]}, "
                    f"here {value}; continue with the former, or delete the checkpoint's groups.pt, which leaves their "
                    "prompts out"
                )
        self.batch, self.groups = state["batch"], []
        for group, replica in zip(state["groups"], _dealt_out(state, self.replicas), strict=True):
            responses = group.responses if replica == self.engine.replica else []
            self.groups.append(replace(group, replica=replica, responses=responses))

    def _settings(self) -> dict[str, int]:
        config = self.config
        return {name: getattr(config, name) for name in ("responses_per_prompt", "max_response_tokens")}


def _part(replica: int, count: int, replicas: int) -> int:
    """A replica's part of `count` groups."""
    return len(range(replica, count, replicas))


def _dealt_out(state: dict[str, Any], replicas: int) -> list[int]:
    """The replica that continues each group of a checkpoint."""
    return [group.replica if state["replicas"] == replicas else i % replicas for i, group in enumerate(state["groups"])]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
