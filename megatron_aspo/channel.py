"""Between the ranks that train and the ranks that generate: messages and weights, first in, first out."""

from __future__ import annotations

import contextlib
import pickle
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.errors import RunError, UserError
from megatron_aspo.gathering import FOREVER
from megatron_aspo.weight_sync import Weight

Role = Literal["training", "rollout"]
ROLES: tuple[Role, Role] = ("training", "rollout")

_CONNECT = timedelta(minutes=30)
"""Of the first contact. A message may take as long as training or generation does; a peer that dies ends the wait."""

_FAILS_TOO = timedelta(seconds=10)
"""How long after a rank the first of its role may find the same error."""

_FAILED, _ENDED = "failed", "ended"
"""Keys in the store: the role's first rank has failed; it has seen the other role end."""

_ALIGNMENT = 16
"""Bytes; where a tensor begins in a bucket, so that it can be looked at as what it is."""


class PeerLostError(RunError):
    """The ranks of the other role have ended without a word."""


@dataclass(frozen=True)
class _Failure:
    kind: type[UserError | RunError]
    text: str


class Channel:
    """One end. All ranks of a role make the same calls; its first rank talks to the other role's first, over gloo and
    host memory whatever the device, and what it receives is passed on within the role.

    Sending does not wait: a message is copied, and kept until the other side's next message has acknowledged it. So
    weights can be on their way while the other side is busy, one copy of the model in host memory for each that it
    has not taken yet.

    Attributes:
        role: this end's.
    """

    def __init__(self, role: Role, store: dist.Store) -> None:
        """Collective over both roles. `store` is common to them; the default process group is the role's."""
        self.role = role
        self._other = 1 - ROLES.index(role)
        self._store = dist.PrefixStore(f"channel of {role}", store)
        self._leads = dist.get_rank() == 0
        self._ranks: Any = dist.new_group(backend="gloo", timeout=FOREVER)
        self._link: Any = None
        if self._leads:
            link = dist.PrefixStore("channel", store)
            self._link = dist.ProcessGroupGloo(link, ROLES.index(role), 2, _CONNECT)
        self._received = 0
        self._acknowledged = 0
        self._unacknowledged: deque[tuple[Any, ...]] = deque()
        self._lost: RuntimeError | None = None

    def send(self, message: Any) -> None:
        """Anything that can be pickled."""
        if self._leads:
            self._post(torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8))

    def receive(self) -> Any:
        """The next message, on every rank of the role.

        Raises:
            PeerLostError: the other role has ended.
            UserError, RunError: what went wrong there (see `fail`).
        """
        payload = self._next()
        message = self._share(None if payload is None else pickle.loads(payload.numpy().tobytes()))
        if isinstance(message, _Failure):
            raise message.kind(message.text)
        return message

    def send_weights(self, bucket: list[Weight]) -> None:
        """Tensors with their names; the other side must call `receive_weights`."""
        if not self._leads:
            return
        layout = [(name, tensor.shape, tensor.dtype) for name, tensor in bucket]
        self.send(layout)
        flat = torch.empty(sum(_padded(tensor.nbytes) for _, tensor in bucket), dtype=torch.uint8)
        start = 0
        for _, tensor in bucket:
            flat[start : start + tensor.nbytes].copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
            start += _padded(tensor.nbytes)
        self._post(flat)

    def receive_weights(self, device: torch.device) -> list[Weight]:
        """What `send_weights` sent, on every rank of the role; the tensors share memory.

        Raises:
            PeerLostError: the other role has ended.
        """
        layout = self.receive()
        flat = self._next()
        if self._ranks.size() > 1:
            size = sum(_padded(shape.numel() * dtype.itemsize) for _, shape, dtype in layout)
            flat = torch.empty(size, dtype=torch.uint8, device=device) if flat is None else flat.to(device)
            dist.broadcast(flat, src=0)
        assert flat is not None
        bucket: list[Weight] = []
        start = 0
        for name, shape, dtype in layout:
            size = shape.numel() * dtype.itemsize
            bucket.append((name, flat[start : start + size].view(dtype).view(shape)))
            start += _padded(size)
        return bucket

    def close(self) -> None:
        """Take leave of the other side, which calls this too. The rollout ranks have been told by a message None.

        Raises:
            PeerLostError: the rollout ranks have ended before.
        """
        self.send(None)
        if self.role == "training":
            self.receive()
        else:
            self._wait_for_the_end()

    def fail(self, error: UserError | RunError) -> None:
        """Let the other side's next `receive` raise the error, and wait until that has ended. To be called by all ranks
        of the role that have the error; normally all have.

        Raises:
            RunError: the role's first rank does not have it. It may be in a collective that this rank never came to, so
                this rank must end, and the launcher then ends the others.
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
        """Until the other side has ended: the first rank reads on, heedless of what comes; the others see it end."""
        with contextlib.suppress(RuntimeError):
            while self._leads:
                self._take()
            self._store.wait([_ENDED], FOREVER)
        if self._leads:
            with contextlib.suppress(RuntimeError):
                self._store.set(_ENDED, "")

    def _post(self, payload: Tensor) -> None:
        if self._lost is not None:
            return
        header = torch.tensor([payload.numel(), self._received])
        try:
            works = [self._link.send([part], self._other, 0) for part in (header, payload)]
        except RuntimeError as error:  # to be told by the next `receive`, which all ranks of the role are part of
            self._lost = error
            return
        self._unacknowledged.append((*works, header, payload))

    def _take(self) -> Tensor:
        """The bytes of the next message; raises RuntimeError where the connection is broken."""
        if self._lost is not None:
            raise self._lost
        header = torch.empty(2, dtype=torch.int64)
        self._link.recv([header], self._other, 0).wait(FOREVER)
        size, acknowledged = header.tolist()
        payload = torch.empty(size, dtype=torch.uint8)
        self._link.recv([payload], self._other, 0).wait(FOREVER)
        self._received += 1
        while self._acknowledged < acknowledged:
            header_sent, payload_sent, *_ = self._unacknowledged.popleft()
            header_sent.wait()
            payload_sent.wait()
            self._acknowledged += 1
        return payload

    def _next(self) -> Tensor | None:
        """The bytes of the next message, on the role's first rank. Raises on every rank."""
        payload, lost = None, None
        if self._leads:
            try:
                payload = self._take()
            except RuntimeError:  # gloo's, when the connection breaks
                other = ROLES[self._other]
                lost = PeerLostError(
                    f"the {other} ranks have ended, for a reason that they tell, and so do the {self.role} ranks"
                )
        lost = self._share(lost)
        if lost is not None:
            raise lost
        return payload

    def _share(self, message: Any) -> Any:
        """The first rank's message on every rank of the role."""
        if self._ranks.size() == 1:
            return message
        carrier = [message]
        dist.broadcast_object_list(carrier, src=0, group=self._ranks)
        return carrier[0]


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
