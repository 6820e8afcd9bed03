"""Messages between training ranks and rollout ranks, first in, first out."""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.errors import RunError, UserError
from megatron_aspo.ranks.gathering import share_ranks, waiting
from megatron_aspo.ranks.lanes import CONNECT, ROLES, Lanes, PeerLostError, Role

_FAILS_TOO = timedelta(seconds=10)
"""Time that the role's first rank may need to find another rank's error."""

_FAILED, _ENDED = "failed", "ended"
"""Keys in the store, set by a role's first rank: it has failed; it has seen the other role end."""


@dataclass(frozen=True)
class _Failure:
    kind: type[UserError | RunError]
    text: str


class Channel:
    """One end of the connection between the roles. All ranks of a role make the same calls, except those of `lanes`.

    The roles' first ranks exchange messages over gloo in host memory, and pass on what they receive within their role.
    Sending does not block: a message is kept until the other side's next message acknowledges it. Large tensors go by
    `lanes`.
    """

    def __init__(self, role: Role, store: dist.Store, others: range) -> None:
        """Connect; collective over both roles. They share `store`, and each has its own default process group.

        others: the other role's ranks, numbered among all ranks.
        """
        self.role: Role = role
        self._others = others
        self._other = 1 - ROLES.index(role)
        self._store = dist.PrefixStore(f"channel of {role}", store)
        self._leads = dist.get_rank() == 0
        self._shared = share_ranks()
        self._ranks, self._limit = self._shared.group, self._shared.limit
        self._link: Any = None
        if self._leads:
            link = dist.PrefixStore("channel", store)
            self._link = dist.ProcessGroupGloo(link, ROLES.index(role), 2, CONNECT)
        self.lanes = Lanes(role, store, len(others), self._limit)
        self._received = 0
        self._acknowledged = 0
        self._unacknowledged: deque[tuple[Any, ...]] = deque()
        self._lost: RuntimeError | None = None
        self._arriving: Future[Tensor] | None = None

    def send(self, message: Any) -> None:
        """Send an object that can be pickled."""
        if self._leads:
            self._post(torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8))

    def receive(self, everywhere: bool = True) -> Any:
        """Return the next message, on every rank of the role; without `everywhere` on its first rank, elsewhere None.

        Raises:
            PeerLostError: the other role has ended.
            UserError, RunError: the other role has failed (see `fail`).
        """
        payload = self._next()
        message = None if payload is None else pickle.loads(payload.numpy().tobytes())
        shared = self.share(message if everywhere or isinstance(message, _Failure) else None)
        if isinstance(shared, _Failure):
            raise shared.kind(shared.text)
        return message if self._leads else shared

    def peek(self) -> Any:
        """Return what the next `receive` returns if it has arrived, else None. For the role's first rank."""
        if self._arriving is None:
            self._arriving = arriving = Future[Tensor]()

            def take() -> None:
                try:
                    arriving.set_result(self._take_now())
                except Exception as error:
                    arriving.set_exception(error)

            threading.Thread(target=take, name="channel", daemon=True).start()
        if not self._arriving.done() or self._arriving.exception() is not None:
            return None
        return pickle.loads(self._arriving.result().numpy().tobytes())

    def close(self) -> None:
        """End the connection when both sides call this. The rollout ranks call it after receiving None.

        Raises:
            PeerLostError: the rollout ranks have already ended.
        """
        self.send(None)
        if self.role == "training":
            self.lanes.end()
            self.receive()
        else:
            self._wait_for_the_end()

    def fail(self, error: UserError | RunError) -> None:
        """Make the other side's next `receive` raise the error, and wait until the other side has ended. Must be called
        by all ranks that have the error, normally the whole role.

        Raises:
            RunError: the role's first rank does not have the error. It may wait for this rank in a collective, so this
                rank must end; the launcher then ends the others.
        """
        if self._leads:
            self._store.set(_FAILED, "")
            self.send(_Failure(UserError if isinstance(error, UserError) else RunError, str(error)))
            self._wait_for_the_end()
            return
        try:
            self._store.wait([_FAILED], _FAILS_TOO)
        except RuntimeError:
            raise RunError(str(error)) from None
        self._wait_for_the_end()

    def _wait_for_the_end(self) -> None:
        """Block until the other side has ended. The first rank discards messages until the connection breaks."""
        with contextlib.suppress(RuntimeError, RunError):
            while self._leads:
                self._take()
            self._store.wait([_ENDED], self._limit)
        if self._leads:
            with contextlib.suppress(RuntimeError):
                self._store.set(_ENDED, "")

    def _post(self, payload: Tensor) -> None:
        if self._lost is not None:
            return
        header = torch.tensor([payload.numel(), self._received])
        try:
            works = [self._link.send([part], self._other, 0) for part in (header, payload)]
        except RuntimeError as error:  # raised by the next `receive`, in which all ranks of the role take part
            self._lost = error
            return
        self._unacknowledged.append((*works, header, payload))

    def _take(self) -> Tensor:
        """Receive the next message's bytes. Raises RuntimeError if the connection is broken, RunError at the limit."""
        arriving, self._arriving = self._arriving, None
        return self._take_now() if arriving is None else arriving.result()

    def _take_now(self) -> Tensor:
        if self._lost is not None:
            raise self._lost
        header = torch.empty(2, dtype=torch.int64)
        # The rollout ranks wait during every update.
        with waiting(self._limit, lambda: self._shared.describe_others(self._others), lambda: self.role == "training"):
            self._link.recv([header], self._other, 0).wait(self._limit)
        size, acknowledged = header.tolist()
        payload = torch.empty(size, dtype=torch.uint8)
        self._link.recv([payload], self._other, 0).wait(self._limit)
        self._received += 1
        while self._acknowledged < acknowledged:
            header_sent, payload_sent, *_ = self._unacknowledged.popleft()
            header_sent.wait()
            payload_sent.wait()
            self._acknowledged += 1
        return payload

    def _next(self) -> Tensor | None:
        """Receive the next message's bytes on the role's first rank. Errors are raised on every rank."""
        payload, lost = None, None
        if self._leads:
            try:
                payload = self._take()
            except RunError as error:
                lost = error
            except RuntimeError:  # gloo's, if the connection breaks
                lost = PeerLostError.on(self.role)
        lost = self.share(lost)
        if lost is not None:
            raise lost
        return payload

    def share(self, message: Any, source: int = 0) -> Any:
        """Broadcast a message of one of the role's ranks within the role."""
        if self._ranks.size() == 1:
            return message
        carrier = [message]
        dist.broadcast_object_list(carrier, src=source, group=self._ranks)
        return carrier[0]
