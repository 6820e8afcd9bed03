"""Two roles, each with a default process group of its own, and the channel between them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ends, run, run_config
from torch import Tensor

from megatron_aspo.channel import Channel, PeerLostError
from megatron_aspo.config import RolloutConfig, RunConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.weight_sync import Weight

pytestmark = pytest.mark.distributed


def config_with(ranks: int) -> RunConfig:
    return run_config(rollout=RolloutConfig(engine="vllm", ranks=ranks))


def make_bucket(version: int) -> list[Weight]:
    """40 MB, more than sockets hold, of types of which the smaller ends where the larger cannot begin."""
    return [
        ("small", torch.full((3,), version, dtype=torch.bfloat16)),
        ("large", torch.arange(10_000_000, dtype=torch.float32).view(1000, -1).T + version),
        ("scalar", torch.tensor(version, dtype=torch.float64)),
    ]


def talk(config: RunConfig, sent: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with distributed(config) as channel:
        assert channel is not None
        found["role"] = channel.role, dist.get_rank(), dist.get_world_size()
        total = torch.tensor(1.0 + dist.get_rank())
        dist.all_reduce(total)  # within the role
        found["total"] = float(total)
        if channel.role == "training":
            train(channel, found, sent)
        else:
            while not sent.exists():  # a sender that waited for us would wait for ever
                time.sleep(0.05)
            generate(channel, found)
    return found


def train(channel: Channel, found: dict[str, Any], sent: Path) -> None:
    for version in range(3):  # all of it before the other side looks
        channel.send(("weights", version))
        bucket = make_bucket(version)
        channel.send_weights(bucket)
        bucket[1][1].zero_()  # the policy goes on; what was sent stays as it was
        channel.send(("question", version))
    sent.touch()
    found["answers"] = [channel.receive() for _ in range(3)]
    if dist.get_rank() == 0:
        found["kept"] = len(channel._unacknowledged)
    channel.send(None)


def generate(channel: Channel, found: dict[str, Any]) -> None:
    weights: list[Weight] = []
    while (message := channel.receive()) is not None:
        what, version = message
        if what == "weights":
            weights = channel.receive_weights(torch.device("cpu"))
            continue
        expected = make_bucket(version)
        assert [name for name, _ in weights] == [name for name, _ in expected]
        for (_, ours), (_, theirs) in zip(weights, expected, strict=True):
            assert isinstance(ours, Tensor)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        found[version] = True
        channel.send(f"answer {version}")


@pytest.mark.parametrize(("training", "rollout"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_messages_and_weights_arrive_whole_and_in_order_on_every_rank(
    training: int, rollout: int, tmp_path: Path
) -> None:
    everyones = run(training + rollout, talk, config_with(rollout), tmp_path / "sent")
    for rank, found in enumerate(everyones[:training]):
        assert found["role"] == ("training", rank, training)
        assert found["total"] == training * (training + 1) / 2
        assert found["answers"] == ["answer 0", "answer 1", "answer 2"]
    # What came before the last question was acknowledged by its answer.
    assert everyones[0]["kept"] == 0
    for rank, found in enumerate(everyones[training:]):
        assert found["role"] == ("rollout", rank, rollout)
        assert found["total"] == rollout * (rollout + 1) / 2
        assert [found[version] for version in range(3)] == [True] * 3


def complain(config: RunConfig) -> str:
    with distributed(config) as channel:
        assert channel is not None
        if channel.role == "rollout":
            channel.fail(UserError("no such model"))
            os._exit(2)
        channel.send(make_bucket(1))  # which nobody reads
        with pytest.raises(UserError, match="no such model") as error:
            channel.receive()
        print(error.value, flush=True)
        os._exit(3)


def test_a_mistake_found_by_one_role_is_raised_in_the_other() -> None:
    ended = ends(4, complain, config_with(2))
    assert [code for code, _ in ended] == [3, 3, 2, 2]
    assert all("no such model" in output for _, output in ended[:2])


def fail_alone(config: RunConfig) -> None:
    with distributed(config) as channel:
        assert channel is not None
        if channel.role == "training":
            channel.receive()
        elif dist.get_rank() == 0:
            dist.all_reduce(torch.zeros(1))  # to which the other never comes
        with pytest.raises(RunError, match="my disk is full") as error:
            channel.fail(UserError("my disk is full"))
        print(error.value, flush=True)
        os._exit(1)


def test_a_rank_that_fails_by_itself_ends() -> None:
    ended = ends(3, fail_alone, config_with(2))
    assert ended[2][0] == 1
    assert "my disk is full" in ended[2][1]
    assert all(code != 0 for code, _ in ended[:2])


def lose(config: RunConfig, victim: str) -> None:
    with distributed(config) as channel:
        assert channel is not None
        if channel.role == victim:
            channel.send(make_bucket(1))
            time.sleep(3)  # till all of it is there
            os.kill(os.getpid(), signal.SIGKILL)
        channel.receive()
        start = time.monotonic()
        with pytest.raises(PeerLostError) as error:
            channel.receive()
        print(error.value, flush=True)
        assert time.monotonic() - start < 7
        os._exit(3)


@pytest.mark.parametrize("victim", ["training", "rollout"])
def test_a_role_that_dies_ends_the_wait_of_the_other(victim: str) -> None:
    ended = ends(4, lose, config_with(2), victim)
    dead, others = (ended[:2], ended[2:]) if victim == "training" else (ended[2:], ended[:2])
    assert [code for code, _ in dead] == [-signal.SIGKILL] * 2
    for code, output in others:
        assert code == 3
        assert f"the {victim} ranks have ended" in output
