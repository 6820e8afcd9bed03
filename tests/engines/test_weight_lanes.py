"""Each rank's share of the weights, the lanes that carry them, and where they wait while the rollout ranks sample."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ends, run, run_config
from test_weights import config_of, policy_of
from tiny_models import VOCAB, write_model
from torch import Tensor

from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.ranks.channel import Channel
from megatron_aspo.ranks.lanes import PeerLostError
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.weight_lanes import ReceivedWeights, WeightSender
from megatron_aspo.rollout.weight_sync import Checksum, PolicyWeights, Weight, WeightSyncError, checksum

pytestmark = [pytest.mark.engines, pytest.mark.distributed]

SHARES = {
    "tp2-dp2": (4, ParallelConfig(tensor=2)),
    "tp2-pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "pp2-vp2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "ep2-pp2": (4, ParallelConfig(expert=2, pipeline=2)),
    "ep2-tp2-etp1": (4, ParallelConfig(expert=2, tensor=2, expert_tensor=1, sequence_parallel=True)),
}


def shares_of(folders: list[Path], parallel: ParallelConfig) -> list[dict[str, Any]]:
    """For each folder every rank's share, and the whole model, by checksums."""
    found: list[dict[str, Any]] = []
    with distributed(config_of(folders[0], parallel)):
        for folder in folders:
            config = config_of(folder, parallel)
            with policy_of(config, VOCAB) as policy:
                source = PolicyWeights(policy)
                whole = {name: checksum(tensor) for name, tensor in source.weights()}
                share = [(name, checksum(tensor), tensor.nbytes) for name, tensor in source.share()]
            shares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shares, share)
            found.append({"whole": whole, "shares": shares})
    return found


@pytest.mark.parametrize("layout", SHARES)
def test_every_tensor_is_in_the_share_of_one_rank(layout: str, tiny: Path, tmp_path: Path) -> None:
    world_size, parallel = SHARES[layout]
    names = ("qwen3-moe", "deepseek-v3") if "ep" in layout else ("llama-tied", "qwen3")
    folders = [tiny / name for name in names]
    if "vp" in layout:  # a layer for each virtual stage
        folders = [write_model(name, tmp_path / name, num_hidden_layers=4) for name in names]
    for found in run(world_size, shares_of, folders, parallel)[0]:
        union: list[tuple[str, Checksum]] = [(n, c) for share in found["shares"] for n, c, _ in share]
        assert len(union) == len(dict(union)) == len(found["whole"])
        assert dict(union) == found["whole"]
        sizes = [sum(size for *_, size in share) for share in found["shares"]]
        whole = sum(c.shape.numel() * c.dtype.itemsize for c in found["whole"].values())
        assert sum(sizes) == whole


BUCKET = 3 << 20
VERSIONS = 4


class MadeUp:
    """A training rank's share of a model: tensors of several types and of more than a bucket."""

    stage = 0

    def __init__(self) -> None:
        self.weight_version = 0
        self.lost = -1

    def share(self) -> Iterator[Weight]:
        for i in range(6):
            if i != self.lost:
                yield f"{dist.get_rank()}.{i}", values(dist.get_rank(), i, self.weight_version)


def values(rank: int, i: int, version: int) -> Tensor:
    dtype = (torch.float32, torch.bfloat16, torch.float64)[i % 3]
    return (torch.arange(300_000 + 7 * i) % 1000 + 10 * version + rank).to(dtype).view(-1, 1)


def padded_bytes(rank: int) -> int:
    """Bytes of a training rank's buckets, in which tensors start at multiples of 16 bytes."""
    return sum(-(-values(rank, i, 0).nbytes // 16) * 16 for i in range(6))


def send_all(channel: Channel, sent: Path) -> dict[str, Any]:
    """Send every version; then a refit that lacks a tensor of the last rank."""
    buckets: list[weakref.ref[Tensor]] = []
    most, post = 0, channel.lanes.send

    def count(peer: int, tensor: Tensor, tag: int) -> Any:
        nonlocal most
        future = post(peer, tensor, tag)
        buckets.append(weakref.ref(tensor))
        most = max(most, sum(alive.nbytes > 1000 for bucket in buckets if (alive := bucket()) is not None))
        return future

    channel.lanes.send = count
    source: Any = MadeUp()
    sender = WeightSender(source, channel, BUCKET, with_checksums=True)
    for source.weight_version in range(VERSIONS):
        sender.send()
    (sent / str(dist.get_rank())).touch()
    assert channel.receive() == "loaded"
    source.lost = 3 if dist.get_rank() == dist.get_world_size() - 1 else -1
    with pytest.raises(WeightSyncError, match=f"^1 of 6 tensors .*: {dist.get_world_size() - 1}.3$"):
        sender.send()
    channel.send("refused")
    return {"most": most}


def staged_bytes(received: ReceivedWeights, versions: int) -> int:
    """Bytes that wait on this rank once all buckets are here: the last is still on the way when `send` returns."""
    parts = Counter(bucket.sender for bucket in received._layout if bucket.receiver == dist.get_rank())
    while any(received._staged[sender].qsize() < versions * count for sender, count in parts.items()):
        time.sleep(0.02)
    return sum(flat.nbytes for lane in received._staged.values() for _, flat in lane.queue)


def load_all(channel: Channel, sent: Path) -> dict[str, Any]:
    """Load the first version; load the others when all have been sent."""
    received = ReceivedWeights(channel, with_checksums=True)
    orders: list[list[str]] = []
    staged = -1
    for version in range(VERSIONS):
        if version == 1:
            while len(list(sent.iterdir())) < channel.lanes.others:  # a sender that waited for this rank never would
                time.sleep(0.02)
            staged = staged_bytes(received, VERSIONS - 1)
        assert channel.receive() == ("refit", version)
        received.weight_version = version
        loaded = [(name, tensor.clone()) for name, tensor in received.weights()]
        for name, tensor in loaded:
            rank, i = map(int, name.split("."))
            assert torch.equal(tensor, values(rank, i, version))
            assert checksum(tensor) == received.sent_checksums[name]
        orders.append([name for name, _ in loaded])
    channel.send("loaded")
    assert channel.receive() == ("refit", VERSIONS - 1)
    assert channel.receive() == "refused"
    return {"staged": staged, "orders": orders, "peers": channel.lanes.peers}


def refit(config: RunConfig, sent: Path) -> dict[str, Any]:
    with distributed(config) as channel:
        assert channel is not None
        result = send_all(channel, sent) if channel.role == "training" else load_all(channel, sent)
        if channel.role == "rollout":
            assert channel.receive() is None
        return result


@pytest.mark.parametrize(("training", "rollout"), [(1, 2), (3, 2)])
def test_a_rollout_rank_stages_its_part_while_it_samples(training: int, rollout: int, tmp_path: Path) -> None:
    by_rank = run(training + rollout, refit, run_config(rollout=RolloutConfig(engine="vllm", ranks=rollout)), tmp_path)
    model = sum(padded_bytes(rank) for rank in range(training))
    receivers = by_rank[training:]
    assert sum(result["staged"] for result in receivers) == (VERSIONS - 1) * model  # one copy of each version crosses
    for result in receivers if training > 1 else ():
        assert result["staged"] == (VERSIONS - 1) * sum(padded_bytes(rank) for rank in result["peers"])
    assert all(0 < result["staged"] < (VERSIONS - 1) * model for result in receivers)
    order = [f"{rank}.{i}" for rank in range(training) for i in range(6)]
    for result in receivers:
        assert [sorted(names) for names in result["orders"]] == [order] * VERSIONS
        assert result["orders"] == receivers[0]["orders"][:1] * VERSIONS  # the same on every rank, every time
    assert all(1 <= result["most"] <= 2 for result in by_rank[:training])  # buckets that are alive on a training rank


def lose(config: RunConfig, victim: str) -> None:
    """The last rank of one role dies between two refits."""
    with distributed(config) as channel:
        assert channel is not None
        source: Any = MadeUp()
        sender, received = WeightSender(source, channel, BUCKET, False), ReceivedWeights(channel, False)
        for version in range(3):
            if version == 1 and channel.role == victim and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                if channel.role == "training":
                    source.weight_version = version
                    sender.send()
                else:
                    assert channel.receive() == ("refit", version)
                    received.weight_version = version
                    list(received.weights())
            except PeerLostError as error:
                print(error, flush=True)
                os._exit(3)
        os._exit(0)


@pytest.mark.parametrize("victim", ["training", "rollout"])
def test_all_ranks_report_that_one_of_the_other_role_has_died(victim: str) -> None:
    ended = ends(4, lose, run_config(rollout=RolloutConfig(engine="vllm", ranks=2)), victim)
    dead, others = (ended[1], ended[2:]) if victim == "training" else (ended[3], ended[:2])
    assert dead[0] == -signal.SIGKILL
    for code, output in others:
        assert code == 3
        assert output.splitlines()[-1].startswith(f"the {victim} ranks have ended")
        assert "Traceback" not in output
