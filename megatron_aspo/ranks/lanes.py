"""Connections for tensors between single training ranks and single rollout ranks.

Each lane is a process group of two ranks outside torch's registry: over gloo for tensors in host memory, and over NCCL
for tensors on GPUs.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.errors import RunError
from megatron_aspo.ranks.gathering import waiting

Role = Literal["training", "rollout"]
ROLES: tuple[Role, Role] = ("training", "rollout")

WEIGHTS, SAMPLES = 0, 1
"""Tags of what a lane carries. Tensors with one tag arrive in the order of their sends."""

END = torch.tensor([-1, 0])
"""Header after the last weights: of no version, and of no bytes."""

CONNECT = timedelta(minutes=30)
"""Time limit of a connection. A transfer may take as long as training or generation."""


class PeerLostError(RunError):
    """The other role's ranks have ended without sending an error."""

    @classmethod
    def on(cls, role: Role) -> PeerLostError:
        """The error of this role's ranks."""
        other = ROLES[1 - ROLES.index(role)]
        return cls(f"the {other} ranks have ended (see their output), and so do the {role} ranks")


def peers_of(rank: int, ranks: int, others: int) -> tuple[int, ...]:
    """Ranks of the other role that `rank` has a lane to. The larger role's ranks have one peer each.

    Args:
        ranks, others: sizes of the rank's own role and of the other one.
    """
    return (rank % others,) if ranks >= others else tuple(range(rank, others, ranks))


class Lanes:
    """This rank's lanes. Ranks of both roles are numbered within their role.

    A send does not block: its tensor is kept until the peer has received it. Both roles may send at the same time, and
    several threads may use the lanes if each has tags and peers of its own.

    Attributes:
        others: number of ranks of the other role.
        peers: those of them that this rank has a lane to.
        device: where tensors for the fast lanes are: the GPU if there is one.
    """

    def __init__(self, role: Role, store: dist.Store, others: int, limit: timedelta) -> None:
        """Connect; collective over both roles, which share `store`.

        Args:
            others: number of ranks of the other role.
            limit: of the wait for one tensor.
        """
        self.role: Role = role
        self.others = others
        self.peers = peers_of(dist.get_rank(), dist.get_world_size(), others)
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _HOST
        self._side, self._limit = ROLES.index(role), limit
        self._groups: dict[tuple[str, int], Any] = {}
        for peer in self.peers:
            training, rollout = (dist.get_rank(), peer)[:: -1 if self._side else 1]
            for device in sorted({_HOST.type, self.device.type}):
                lane = dist.PrefixStore(f"{device} lane {training} {rollout}", store)
                self._groups[device, peer] = _FACTORIES[device](lane, self._side)
        self._ends: list[Any] = []
        self._sends: queue.SimpleQueue[tuple[Any, Tensor, Future[None]]] = queue.SimpleQueue()
        threading.Thread(target=self._finish_sends, name="lanes", daemon=True).start()

    @property
    def connections(self) -> int:
        """Process groups that this rank has with ranks of the other role."""
        return len(self._groups)

    def send(self, peer: int, tensor: Tensor, tag: int) -> Future[None]:
        """Send a contiguous tensor, which must not change until the result is there.

        Returns:
            A future that is done when the peer has the tensor, or fails with PeerLostError.
        """
        done = Future[None]()
        try:
            work = self._groups[tensor.device.type, peer].send([tensor], 1 - self._side, tag)
        except RuntimeError:
            done.set_exception(PeerLostError.on(self.role))
        else:
            self._sends.put((work, tensor, done))
        return done

    def end(self) -> None:
        """Send every peer the header that follows the last weights. Nothing waits for it: a peer may never ask."""
        for peer in self.peers:
            with contextlib.suppress(RuntimeError):  # the peer has ended
                self._ends.append(self._groups[_HOST.type, peer].send([END], 1 - self._side, WEIGHTS))

    def receive(self, peer: int, tensor: Tensor, tag: int, limit: timedelta | None = None) -> Tensor:
        """Fill a contiguous tensor with the next one that the peer sends; return it.

        Args:
            limit: of the wait; default: `train.wait_limit_hours`.

        Raises:
            PeerLostError: the peer has ended.
            RunError: nothing came within the limit.
        """
        sender, limit = f"{ROLES[1 - self._side]} rank {peer}", limit or self._limit
        try:
            with waiting(limit, lambda: sender, lambda: False):
                self._wait(self._groups[tensor.device.type, peer].recv([tensor], 1 - self._side, tag), tensor, limit)
        except RuntimeError:  # the backend's, if the connection breaks
            raise PeerLostError.on(self.role) from None
        return tensor

    def _wait(self, work: Any, tensor: Tensor, limit: timedelta) -> None:
        work.wait(limit)
        if tensor.is_cuda:  # NCCL only made the current stream wait
            torch.cuda.current_stream().synchronize()

    def _finish_sends(self) -> None:
        """Wait for the sends in their order, in a thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(torch.cuda.Stream())  # torch.cuda's streams are per thread
        while True:
            work, tensor, done = self._sends.get()
            error = None
            try:
                self._wait(work, tensor, self._limit)
            except RuntimeError:
                error = PeerLostError.on(self.role)
            del work, tensor  # before the result is there: whoever waits for it allocates the next tensor
            done.set_exception(error) if error else done.set_result(None)
            del done


_HOST = torch.device("cpu")


def _gloo(store: dist.Store, side: int) -> Any:
    return dist.ProcessGroupGloo(store, side, len(ROLES), CONNECT)


def _nccl(store: dist.Store, side: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = CONNECT
    return dist.ProcessGroupNCCL(store, side, len(ROLES), options)


_FACTORIES = {"cpu": _gloo, "cuda": _nccl}
