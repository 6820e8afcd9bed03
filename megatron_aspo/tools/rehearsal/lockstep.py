"""Ranks that are rehearsed at the same time, each in a process of its own: small values of collectives travel.

Each rank posts every call on a process group. A call whose result depends on values waits for the other running
members of the group; ranks that do not run are taken to have this rank's own values. Calls that differ, or ranks that
all wait for each other, end the rehearsal with a line for each rank.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener

from megatron_aspo.errors import RunError
from megatron_aspo.tools.rehearsal.agreement import Trouble, compare_groups, describe
from megatron_aspo.tools.rehearsal.events import Event


class Partner:
    """A rank's end of a meeting."""

    def __init__(self, address: str, rank: int) -> None:
        self._connection = Client(address, "AF_UNIX")
        self._connection.send(rank)

    def __enter__(self) -> Partner:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def post(self, event: Event, values: bytes, wait: bool) -> dict[int, bytes]:
        """Post a call. Returns what every running member posted, if `wait`.

        Raises:
            RunError: the ranks do not agree.
        """
        self._connection.send((event, values, wait))
        if not wait:
            return {}
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RunError(answer)
        return answer


class Meeting:
    """Where `ranks` meet.

    Attributes:
        trouble: how they disagree; None as long as they agree.
    """

    def __init__(self, address: str, ranks: Sequence[int]) -> None:
        self.trouble: Trouble | None = None
        self._ranks = ranks
        self._change = threading.Condition()
        self._numbers: Counter[tuple[int, str]] = Counter()
        self._calls: defaultdict[tuple[str, int], dict[int, tuple[Event, bytes]]] = defaultdict(dict)
        self._waiting: dict[int, tuple[str, int]] = {}
        self._ended: set[int] = set()
        self._listener = Listener(address, "AF_UNIX")
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        for _ in self._ranks:
            connection = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        rank = connection.recv()
        while True:
            try:
                event, values, wait = connection.recv()
            except EOFError:
                break
            key = self._post(rank, event, values)
            if wait:
                connection.send(self._wait(rank, key, event))
        with self._change:
            self._ended.add(rank)
            self._find_standstill()
            self._change.notify_all()

    def _post(self, rank: int, event: Event, values: bytes) -> tuple[str, int]:
        with self._change:
            key = event.group, self._numbers[rank, event.group]
            self._numbers[rank, event.group] += 1
            calls = self._calls[key]
            calls[rank] = event, values
            troubles = compare_groups({other: [call] for other, (call, _) in calls.items()})
            if troubles and not self.trouble:
                what = troubles[0].what.replace("at call 1", f"at call {key[1] + 1}")
                self.trouble = replace(troubles[0], what=what)
            self._change.notify_all()
        return key

    def _wait(self, rank: int, key: tuple[str, int], event: Event) -> str | dict[int, bytes]:
        with self._change:
            self._waiting[rank] = key
            self._find_standstill()
            self._change.wait_for(lambda: self.trouble or self._is_complete(key))
            del self._waiting[rank]
            if self.trouble:
                return str(self.trouble)
            return {member: values for member, (_, values) in self._calls[key].items()}

    def _is_complete(self, key: tuple[str, int]) -> bool:
        calls = self._calls[key]
        return all(rank in calls for rank in next(iter(calls.values()))[0].ranks if rank in self._ranks)

    def _find_standstill(self) -> None:
        stuck = {rank: key for rank, key in self._waiting.items() if not self._is_complete(key)}
        if stuck and len(stuck) + len(self._ended) == len(self._ranks) and not self.trouble:
            calls = {rank: describe(self._calls[key][rank][0]) for rank, key in stuck.items()}
            self.trouble = Trouble(
                "ranks that run together wait for each other",
                calls | dict.fromkeys(self._ended, "is at its end"),
            )
            self._change.notify_all()
