"""Whether the collectives and messages of all rehearsed ranks fit together; their order matters, and no clock.

Two checks. All members of a process group must make the same calls on it, in the same order and of the same sizes
(`compare_groups`). And all ranks together must come to their ends (`find_deadlock`) if a call, or the wait for an
asynchronous one, waits for its partners: that finds what is in order within every group, but not between groups. A
rank without a trace is taken to do what its partners wait for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_aspo.tools.rehearsal.events import Event

_MESSAGES = ("send", "recv")


@dataclass(frozen=True)
class Trouble:
    """Calls that do not fit together.

    Attributes:
        ranks: rank -> its call and line of code.
    """

    what: str
    ranks: dict[int, str]

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  rank {rank}: {call}" for rank, call in self.ranks.items())])


def find_troubles(traces: Mapping[int, Sequence[Event]]) -> list[Trouble]:
    """Differences within groups; without any, the first deadlock."""
    calls = {rank: [event for event in events if event.kind != "compute"] for rank, events in traces.items()}
    troubles = compare_groups(calls)
    if not troubles and (deadlock := find_deadlock(calls)):
        troubles.append(deadlock)
    return troubles


def compare_groups(calls: Mapping[int, Sequence[Event]]) -> list[Trouble]:
    """The first difference in every group whose members differ."""
    groups: defaultdict[tuple[str, tuple[int, ...]], dict[int, list[Event]]] = defaultdict(dict)
    for rank, events in calls.items():
        for event in events:
            if event.kind not in (*_MESSAGES, "wait"):
                groups[event.group, event.ranks].setdefault(rank, []).append(event)
    troubles: list[Trouble] = []
    for (group, ranks), members in groups.items():
        lists = {rank: members.get(rank, []) for rank in ranks if rank in calls}
        for i in range(max(map(len, lists.values()))):
            now = {rank: events[i] if i < len(events) else None for rank, events in lists.items()}
            if len({_signature(event) for event in now.values()}) > 1 or not _splits_fit(now, ranks):
                what = f"group {group} of ranks {_short(ranks)}: its members differ at call {i + 1}"
                troubles.append(Trouble(what, {rank: describe(event) for rank, event in now.items()}))
                break
    return troubles


def find_deadlock(calls: Mapping[int, Sequence[Event]]) -> Trouble | None:
    """The point at which the ranks wait for each other, if they do not all come to their ends."""
    at = dict.fromkeys(calls, 0)
    posted: dict[int, list[Event]] = {}  # messages of a rank's current batch without a partner yet
    begun: Counter[tuple[int, str]] = Counter()  # a rank's collectives on a group, which are complete in this order
    works: dict[tuple[int, int], tuple[Event, int]] = {}  # (rank, handle) -> collective and its number on the group
    blocked: dict[int, tuple[Event, int]] = {}

    def head(rank: int) -> Event | None:
        return calls[rank][at[rank]] if at[rank] < len(calls[rank]) else None

    def is_complete(event: Event, number: int) -> bool:
        return all(begun[member, event.group] > number for member in event.ranks if member in calls)

    def advance(rank: int) -> bool:
        if rank in posted:
            return _match_messages(rank, posted, calls)
        event = head(rank)
        if event is None:
            return False
        if event.kind in _MESSAGES:
            posted[rank] = _batch_at(calls[rank], at[rank])
            at[rank] += len(posted[rank])
            return True
        if event.kind != "wait" and rank not in blocked:
            blocked[rank] = works[rank, event.work] = event, begun[rank, event.group]
            begun[rank, event.group] += 1
        call = works.get((rank, event.work))  # none of a message
        if call and not event.asynchronous and not is_complete(*call):
            return False
        blocked.pop(rank, None)
        at[rank] += 1
        return True

    moved = True
    while moved:
        moved = False
        for rank in calls:
            moved = advance(rank) or moved
    stuck = {rank: posted[rank][0] if rank in posted else head(rank) for rank in calls}
    if not any(stuck.values()):
        return None
    for rank, event in stuck.items():
        if event and event.kind == "wait":
            stuck[rank] = works[rank, event.work][0]
    return Trouble("the ranks wait for each other", {rank: describe(event) for rank, event in stuck.items()})


def _batch_at(events: Sequence[Event], first: int) -> list[Event]:
    batch = [events[first]]
    for event in events[first + 1 :]:
        if batch[0].batch < 0 or event.batch != batch[0].batch or event.kind not in _MESSAGES:
            break
        batch.append(event)
    return batch


def _match_messages(rank: int, posted: dict[int, list[Event]], calls: Mapping[int, Sequence[Event]]) -> bool:
    """Take away the messages whose partner has posted its end, or has no trace. Returns whether there were any.

    Between two ranks the first send meets the first receive, in a batch too.
    """
    matched = False
    for event in list(posted[rank]):
        mine = next((other for other in posted[rank] if _same_way(event, other)), None)
        theirs = next((other for other in posted.get(event.peer, ()) if _opposite(event, rank, other)), None)
        if event.peer in calls and (mine is not event or theirs is None or not _fit(event, theirs)):
            continue
        posted[rank].remove(event)
        if theirs is not None:
            posted[event.peer].remove(theirs)
            if not posted[event.peer] and event.peer != rank:
                del posted[event.peer]
        matched = True
    if not posted[rank]:
        del posted[rank]
    return matched


def _same_way(mine: Event, other: Event) -> bool:
    return (other.kind, other.peer, other.group) == (mine.kind, mine.peer, mine.group)


def _opposite(mine: Event, rank: int, theirs: Event) -> bool:
    return theirs.peer == rank and theirs.group == mine.group and theirs.kind != mine.kind


def _fit(mine: Event, theirs: Event) -> bool:
    return (mine.sent, mine.received, mine.dtype) == (theirs.received, theirs.sent, theirs.dtype)


def _signature(event: Event | None) -> tuple[object, ...]:
    if event is None:
        return ()
    sizes = () if event.splits[1] else (event.sent, event.received)
    if event.kind in ("gather", "scatter"):  # only the root has the other
        sizes = (event.sent,) if event.kind == "gather" else (event.received,)
    return (event.kind, event.dtype, event.detail, event.peer, *sizes)


def _splits_fit(now: Mapping[int, Event | None], ranks: Sequence[int]) -> bool:
    """Whether in an all-to-all every rank sends to each other one what that one receives, in rows of one size."""
    exchanges = {rank: event for rank, event in now.items() if event and event.splits[1]}
    return all(
        mine.splits[1][ranks.index(there)] == theirs.splits[0][ranks.index(here)]
        and mine.sent * sum(theirs.splits[0]) == theirs.received * sum(mine.splits[1])
        for here, mine in exchanges.items()
        for there, theirs in exchanges.items()
    )


def describe(event: Event | None) -> str:
    if event is None:
        return "is at its end"
    peer = f" with {event.peer}" if event.peer >= 0 else ""
    size = max(event.sent, event.received)
    return (
        f"{event.kind} {event.detail} of {size} bytes {event.dtype}{peer} on group {event.group} "
        f"{_short(event.ranks)}, {event.phase}, {event.line}"
    )


def _short(ranks: Sequence[int]) -> str:
    return str(list(ranks)) if len(ranks) <= 8 else f"[{ranks[0]}, {ranks[1]}, ... {ranks[-1]}]"
