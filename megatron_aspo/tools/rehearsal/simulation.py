"""Seconds of a rehearsed phase: kernels by the roofline of `costs`, communication by latency and bandwidth, and both
in the order of the traces, so that bubbles and overlaps are those of the schedule that runs.

A partner without a trace is taken to be there when the rank with a trace is. The host is never late: its waits for the
device and slow launches cost nothing here. Nothing was measured.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_aspo.tools.rehearsal.events import Event

_MESSAGES = ("send", "recv")

_LINKS = {"A100-80GB": (300e9, 25e9), "B200": (900e9, 50e9)}
"""GPU -> bytes per second and direction of its NVLink and of its network card, from data sheets of DGX systems."""


@dataclass(frozen=True)
class Network:
    """A cluster's network.

    Attributes:
        inside, between: nominal bytes per second and direction of a GPU within a node and between nodes.
        share: of these, which large collectives reach.
        latency: seconds per hop.
        objects: seconds of a collective of pickled objects.
    """

    gpus_per_node: int = 8
    inside: float = 450e9
    between: float = 50e9
    share: float = 1.0
    latency: float = 5e-6
    objects: float = 2e-3

    def spans_nodes(self, ranks: tuple[int, ...]) -> bool:
        return len(_by_node(ranks, self.gpus_per_node)) > 1

    def bandwidth(self, ranks: tuple[int, ...]) -> float:
        if not self.spans_nodes(ranks):
            return self.inside * self.share
        # A ring leaves a node once per ring; with k ranks in a node there are k network cards for it.
        cards = min(_by_node(ranks, self.gpus_per_node).values())
        return min(self.inside, self.between * cards) * self.share

    def seconds(self, event: Event, rank: int) -> float:
        """Time of a collective or message of `rank`, by latency and bandwidth of rings; of an all-to-all, of lines."""
        size, count = max(event.sent, event.received), len(event.ranks)
        if event.kind in _MESSAGES:
            return self.latency + size / self.bandwidth((rank, event.peer))
        if count <= 1:
            return 0.0
        if event.kind.endswith(("object", "list")):
            return self.objects
        hops, bandwidth = self.latency * math.ceil(math.log2(count)), self.bandwidth(event.ranks)
        share = (count - 1) / count
        if event.kind.startswith("alltoall"):  # no ring: a rank sends the others' parts through its own network card
            near = _by_node(event.ranks, self.gpus_per_node)[rank // self.gpus_per_node]
            inside, between = (near - 1) / count * size / self.inside, (count - near) / count * size / self.between
            return hops + max(inside, between) / self.share
        if event.kind == "allreduce":
            return 2 * hops + 2 * share * size / bandwidth
        if event.kind.startswith(("allgather", "reduce_scatter")):
            return hops + share * size / bandwidth
        return hops + size / bandwidth


def networks(gpu: str, gpus_per_node: int) -> tuple[Network, Network]:
    """A cluster's network at its best and at its worst. The shares and latencies are assumptions; an all-reduce of
    NCCL's over eight H100 reaches about 0.8 of the nominal bandwidth."""
    nominal = (gpus_per_node, *_LINKS.get(gpu, (450e9, 50e9)))
    return Network(*nominal, share=0.9, latency=5e-6), Network(*nominal, share=0.6, latency=20e-6)


@functools.cache
def _by_node(ranks: tuple[int, ...], gpus_per_node: int) -> Counter[int]:
    """Node -> number of the ranks."""
    return Counter(rank // gpus_per_node for rank in ranks)


@dataclass
class Times:
    """Seconds of one rank in one phase: `total` = `compute` + all `exposed` + `waiting`.

    Attributes:
        cost: of the rank's collectives and messages from the moment that all partners are there, by kind.
        exposed: the part of `cost` that the rank waits for.
        waiting: for partners that are not there yet.
    """

    total: float = 0.0
    compute: float = 0.0
    cost: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    exposed: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    waiting: float = 0.0

    @property
    def hidden(self) -> dict[str, float]:
        """Communication beside computation, by kind."""
        return {kind: max(0.0, cost - self.exposed[kind]) for kind, cost in self.cost.items()}


def simulate(traces: Mapping[int, Sequence[Event]], phase: str, network: Network, end: int = 0) -> dict[int, Times]:
    """Run one phase of all traced ranks against the clock, with the least (end 0) or most seconds of computation.

    Raises:
        RuntimeError: the traces do not fit together; `agreement.find_troubles` says where.
    """
    clocks = {
        rank: _Clock(rank, [event for event in events if event.phase == phase], network, end)
        for rank, events in traces.items()
    }
    meetings: defaultdict[tuple[str, int], list[_Post]] = defaultdict(list)
    channels: defaultdict[tuple[int, int, str], tuple[deque[_Post], deque[_Post]]]
    channels = defaultdict(lambda: (deque(), deque()))
    moved = True
    while moved:
        moved = False
        for clock in clocks.values():
            moved = clock.run(clocks, meetings, channels) or moved
    if stuck := [rank for rank, clock in clocks.items() if clock.at < len(clock.events)]:
        raise RuntimeError(f"ranks {stuck} do not come to the end of {phase}")
    for clock in clocks.values():
        clock.times.total = clock.now
    return {rank: clock.times for rank, clock in clocks.items()}


@dataclass
class _Flight:
    """A collective or a message on its way."""

    start: float
    end: float
    kind: str


@dataclass
class _Post:
    """A rank's call that waits for its partners' calls."""

    clock: _Clock
    work: int
    stream: list[_Flight]
    when: float
    cost: float
    kind: str


def _start(posts: Sequence[_Post]) -> None:
    """Let a collective or a message begin: all ranks are there, and it follows the calls before it on their streams."""
    start = max(max(post.when, post.stream[-1].end if post.stream else 0.0) for post in posts)
    cost = max(post.cost for post in posts)
    for post in posts:
        clock = post.clock
        post.stream[:] = [flight for flight in post.stream if flight.end > clock.now]
        post.stream.append(_Flight(start, start + cost, post.kind))
        clock.flights[post.work] = post.stream, start + cost
        clock.times.cost[post.kind] += cost


class _Clock:
    """One rank's time."""

    def __init__(self, rank: int, events: list[Event], network: Network, end: int) -> None:
        self.rank, self.events, self.network, self.end = rank, events, network, end
        self.at, self.now = 0, 0.0
        self.times = Times()
        self.flights: dict[int, tuple[list[_Flight], float]] = {}  # handle -> its stream, and when it is complete
        self._posted: set[int] = set()
        self._streams: defaultdict[str, list[_Flight]] = defaultdict(list)  # group -> collectives, one after the other
        self._meetings: Counter[str] = Counter()

    def run(self, clocks: Mapping[int, _Clock], meetings: dict, channels: dict) -> bool:
        """Advance as far as possible. Returns whether that is at least one event."""
        before = self.at
        while self.at < len(self.events) and self._step(self.events[self.at], clocks, meetings, channels):
            self.at += 1
        return self.at > before

    def _step(self, event: Event, clocks: Mapping[int, _Clock], meetings: dict, channels: dict) -> bool:
        if event.kind == "compute":
            self.now += event.seconds[self.end]
            self.times.compute += event.seconds[self.end]
            return True
        if event.kind == "wait":
            return event.work not in self._posted or self._wait(event.work)  # or of an earlier phase
        work = event.work if event.work >= 0 else ~self.at
        if work not in self._posted:
            self._posted.add(work)
            if event.kind in _MESSAGES:
                self._send(event, work, clocks, channels)
            else:
                self._meet(event, work, clocks, meetings)
        return event.kind in _MESSAGES or event.asynchronous or self._wait(work)

    def _wait(self, work: int) -> bool:
        """Stand still until a call is complete. Returns False if its partners have not come."""
        if work not in self.flights:
            return False
        stream, until = self.flights[work]
        if until > self.now:
            late = until - self.now
            for flight in stream:
                exposed = min(until, flight.end) - max(self.now, flight.start)
                if exposed > 0:
                    self.times.exposed[flight.kind] += exposed
                    late -= exposed
            self.times.waiting += max(0.0, late)
            self.now = until
        return True

    def _send(self, event: Event, work: int, clocks: Mapping[int, _Clock], channels: dict) -> None:
        where = "between nodes" if self.network.spans_nodes((self.rank, event.peer)) else "within a node"
        post = _Post(self, work, [], self.now, self.network.seconds(event, self.rank), f"message {where}")
        if event.peer not in clocks:
            _start([post])
            return
        pair = (self.rank, event.peer) if event.kind == "send" else (event.peer, self.rank)
        mine, theirs = channels[*pair, event.group][:: 1 if event.kind == "send" else -1]
        if theirs:
            _start([theirs.popleft(), post])
        else:
            mine.append(post)

    def _meet(self, event: Event, work: int, clocks: Mapping[int, _Clock], meetings: dict) -> None:
        where = "between nodes" if self.network.spans_nodes(event.ranks) else "within a node"
        kind, cost = f"{event.kind} of {len(event.ranks)} {where}", self.network.seconds(event, self.rank)
        meeting = meetings[event.group, self._meetings[event.group]]
        self._meetings[event.group] += 1
        meeting.append(_Post(self, work, self._streams[event.group], self.now, cost, kind))
        if len(meeting) == sum(rank in event.ranks for rank in clocks):
            _start(meeting)
