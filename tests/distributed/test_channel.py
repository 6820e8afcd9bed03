"""Messages and failures between the two roles, each with its own default process group."""

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

from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.ranks.channel import Channel, PeerLostError
from megatron_aspo.ranks.process_group import distributed

pytestmark = pytest.mark.distributed


def config_with(ranks: int) -> RunConfig:
    return run_config(rollout=RolloutConfig(engine="vllm", ranks=ranks))


def make_message(version: int) -> Tensor:
    """40 MB, more than sockets buffer."""
    return torch.arange(10_000_000, dtype=torch.float32) + version


def talk(config: RunConfig, sent: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with distributed(config) as channel:
        assert channel is not None
        result["role"] = channel.role, dist.get_rank(), dist.get_world_size()
        total = torch.tensor(1.0 + dist.get_rank())
        dist.all_reduce(total)  # within the role
        result["total"] = float(total)
        if channel.role == "training":
            train(channel, result, sent)
        else:
            while not sent.exists():  # a sender that waited for this rank would wait forever
                time.sleep(0.05)
            generate(channel, result)
    return result


def train(channel: Channel, result: dict[str, Any], sent: Path) -> None:
    for version in range(3):  # sends everything before the other side receives
        message = make_message(version)
        channel.send((version, message))
        message.zero_()  # what was sent must not change
    sent.touch()
    result["answers"] = [channel.receive() for _ in range(3)]
    if dist.get_rank() == 0:
        result["kept"] = len(channel._unacknowledged)
    channel.send(None)


def generate(channel: Channel, result: dict[str, Any]) -> None:
    while (message := channel.receive()) is not None:
        version, tensor = message
        assert torch.equal(tensor, make_message(version))
        result[version] = True
        channel.send(f"answer {version}")


@pytest.mark.parametrize(("training", "rollout"), [(1, 1), (2, 2)])
def test_messages_arrive_whole_and_in_order_on_every_rank(training: int, rollout: int, tmp_path: Path) -> None:
    by_rank = run(training + rollout, talk, config_with(rollout), tmp_path / "sent")
    for rank, result in enumerate(by_rank[:training]):
        assert result["role"] == ("training", rank, training)
        assert result["total"] == training * (training + 1) / 2
        assert result["answers"] == ["answer 0", "answer 1", "answer 2"]
    # The reply to the last question also acknowledges every earlier message.
    assert by_rank[0]["kept"] == 0
    for rank, result in enumerate(by_rank[training:]):
        assert result["role"] == ("rollout", rank, rollout)
        assert result["total"] == rollout * (rollout + 1) / 2
        assert [result[version] for version in range(3)] == [True] * 3


def complain(config: RunConfig) -> str:
    with distributed(config) as channel:
        assert channel is not None
        if channel.role == "rollout":
            channel.fail(UserError("no such model"))
            os._exit(2)
        channel.send(make_message(1))  # never received
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
            dist.all_reduce(torch.zeros(1))  # the peer never joins
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
            channel.send(make_message(1))
            time.sleep(3)  # until everything has arrived
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
