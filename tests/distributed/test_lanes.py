"""Tensors between single ranks of the two roles: every pair, both directions, and the death of a peer."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ends, run, run_config

from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.ranks.lanes import SAMPLES, WEIGHTS, PeerLostError, peers_of
from megatron_aspo.ranks.process_group import distributed

pytestmark = pytest.mark.distributed

MB = 1 << 20


def config_with(ranks: int) -> RunConfig:
    return run_config(rollout=RolloutConfig(engine="vllm", ranks=ranks))


@pytest.mark.parametrize(("training", "rollout"), [(1, 1), (1, 3), (3, 2), (4, 2), (8, 3), (2, 5), (256, 64)])
def test_both_ends_of_a_lane_name_each_other_and_every_rank_has_one(training: int, rollout: int) -> None:
    sent = {(t, r) for t in range(training) for r in peers_of(t, training, rollout)}
    assert sent == {(t, r) for r in range(rollout) for t in peers_of(r, rollout, training)}
    assert len(sent) == max(training, rollout)
    assert {t for t, _ in sent} == set(range(training))
    assert {r for _, r in sent} == set(range(rollout))


def values(training: int, rollout: int, tag: int) -> torch.Tensor:
    return torch.arange(5 * MB, dtype=torch.int32) * (2 * training + 1) + 1000 * rollout + tag


def exchange(config: RunConfig, sent: Path) -> dict[str, Any]:
    """Weights go one way while samples go the other; all sends come before the first receive."""
    with distributed(config) as channel:
        assert channel is not None
        lanes, rank = channel.lanes, dist.get_rank()
        trains = channel.role == "training"
        tags = (WEIGHTS, SAMPLES) if trains else (SAMPLES, WEIGHTS)
        pair = (lambda peer: (rank, peer)) if trains else (lambda peer: (peer, rank))
        futures = [lanes.send(peer, values(*pair(peer), tags[0]), tags[0]) for peer in lanes.peers for _ in range(2)]
        (sent / f"{channel.role} {rank}").touch()
        while len(list(sent.iterdir())) < 3:
            pass
        wrong: list[int] = []

        def receive(peer: int) -> None:
            for _ in range(2):
                tensor = lanes.receive(peer, torch.empty(5 * MB, dtype=torch.int32), tags[1])
                if not torch.equal(tensor, values(*pair(peer), tags[1])):
                    wrong.append(peer)

        threads = [threading.Thread(target=receive, args=(peer,)) for peer in lanes.peers]
        for thread in threads:
            thread.start()
        total = torch.ones(1)
        dist.all_reduce(total)  # of the role, beside the lanes
        for thread in threads:
            thread.join()
        for future in futures:
            future.result()
        return {"wrong": wrong, "total": float(total), "connections": lanes.connections, "peers": lanes.peers}


@pytest.mark.parametrize(("training", "peers"), [(2, [(0,), (0,), (0, 1)]), (1, [(0, 1), (0,), (0,)])])
def test_tensors_cross_in_both_directions_at_once(training: int, peers: list[tuple[int, ...]], tmp_path: Path) -> None:
    by_rank = run(3, exchange, config_with(3 - training), tmp_path)
    assert [result["peers"] for result in by_rank] == peers
    assert [result["connections"] for result in by_rank] == [len(of_rank) for of_rank in peers]
    assert [result["wrong"] for result in by_rank] == [[]] * 3
    assert [result["total"] for result in by_rank] == [training] * training + [3 - training] * (3 - training)


def lose(config: RunConfig, victim: str) -> None:
    with distributed(config) as channel:
        assert channel is not None
        lanes = channel.lanes
        if channel.role == victim:
            lanes.receive(0, torch.empty(1), SAMPLES)
            os.kill(os.getpid(), signal.SIGKILL)
        lanes.send(0, torch.zeros(1), SAMPLES).result()
        sent = lanes.send(0, torch.zeros(5 * MB), WEIGHTS)  # never received
        for wait in (sent.result, lambda: lanes.receive(0, torch.empty(1), WEIGHTS)):
            with pytest.raises(PeerLostError, match=f"the {victim} ranks have ended"):
                wait()
        os._exit(3)


@pytest.mark.parametrize("victim", ["training", "rollout"])
def test_the_death_of_a_peer_ends_sends_and_receives(victim: str) -> None:
    codes = [code for code, _ in ends(2, lose, config_with(1), victim)]
    assert codes == ([-signal.SIGKILL, 3] if victim == "training" else [3, -signal.SIGKILL])
