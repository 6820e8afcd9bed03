"""The simulated clock of benchmarks/long_tail.py against cases by hand."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.long_tail import PROMPT, Machine, Mode, Outcome, Replica, Response, Unit, run


def second(running: int, cached: float) -> float:
    return 1.0


def replica(*units: tuple[int, ...], slots: int = 2, started: int = 0) -> Replica:
    """A replica whose steps take a second, with units of responses of these lengths."""
    engine = Replica(slots, second)
    engine.units = [Unit(started, [Response(length) for length in lengths]) for lengths in units]
    return engine


def test_waiting_responses_take_the_place_of_complete_ones() -> None:
    """Two slots and lengths 2, 4, 3: the third runs from second 2 to 5."""
    engine = replica((2,), (4,), (3,))
    assert [response.length for response in engine.sample(3)] == [2, 4, 3]
    assert engine.units == []
    assert (engine.clock, engine.occupied) == (5, 2 * 4 + 1)


def test_a_step_takes_longer_with_more_in_the_cache() -> None:
    """Four steps of two responses read 0, 2, 4 and 6 tokens more than the prompts; then one is alone for a step."""
    engine = replica((4, 5))
    engine.seconds_of, engine.prefill = lambda running, cached: 1 + cached / 1000, 0.01
    engine.sample(1)
    pair = 4 + (4 * 2 * PROMPT + 0 + 2 + 4 + 6) / 1000
    assert engine.clock == pytest.approx(0.01 * 2 * PROMPT + pair + 1 + (PROMPT + 4) / 1000)


def test_a_batch_that_ends_with_its_first_complete_group() -> None:
    """The second group is complete at second 3, and what the first one has by then stays for the next batch."""
    engine = replica((3, 9), (2, 3), slots=4)
    assert [response.length for response in engine.sample(1)] == [2, 3]
    assert engine.clock == 3
    (unit,) = engine.units
    assert [(response.length, response.written) for response in unit.responses] == [(3, 3), (9, 3)]
    engine.update(7, 0.5)
    assert [response.spans for response in engine.sample(1)] == [[(0, 3)], [(0, 3), (7, 6)]]
    assert engine.clock == 3.5 + 6


def test_a_batch_waits_for_what_is_due() -> None:
    """One complete group is enough at second 3, but the one that began in batch 0 ends at second 9."""
    engine = replica((3, 9), slots=4)
    engine.units.append(Unit(2, [Response(2), Response(3)]))
    assert [response.length for response in engine.sample(1, due=0)] == [3, 9]
    assert engine.clock == 9
    assert [unit.is_complete for unit in engine.units] == [True]
    assert [response.length for response in engine.sample(1, due=1)] == [2, 3]
    assert engine.clock == 9  # it was complete


def test_weights_that_arrive_in_flight() -> None:
    """At second 2.5 two tokens are written, and the third step of both ends a second after the weights are loaded."""
    engine = replica((3, 5))
    done = engine.sample(1, updates=[(2.5, 1)], load=0.6)
    assert [response.spans for response in done] == [[(0, 2), (1, 1)], [(0, 2), (1, 3)]]
    assert engine.clock == pytest.approx(2.5 + 0.6 + 3)


def test_weights_that_arrive_during_a_prefill() -> None:
    """They are loaded behind it, before the first step."""
    engine = replica((3,))
    engine.prefill = 10 / PROMPT
    assert [response.spans for response in engine.sample(1, updates=[(2.0, 1)], load=0.5)] == [[(1, 3)]]
    assert engine.clock == pytest.approx(10 + 0.5 + 3)


def outcome(
    mode: Mode, train: float, lengths: tuple[int, ...] = (4,), load: float = 0.0, wire: float = 0.0, steps: int = 24
) -> Outcome:
    """Steps of a response each, which have the lengths in turn."""
    turns = itertools.cycle(lengths)
    machine = Machine(1, 2, second, 0.0, lambda tokens: train, load, wire)
    return run(mode, machine, 1, lambda group: [next(turns)], steps)


def test_all_gpus_sample_and_train_in_turn() -> None:
    found = outcome(Mode("exact"), 10.0, load=1.0)
    assert found.seconds == 1 + 4 + 10 + 1  # the policy gathers its weights, and the engine takes them
    assert found.tokens == PROMPT + 4
    assert (found.stale, found.age, found.oldest) == (0, 0, 0)
    assert found.slots == pytest.approx(4 / 5 / 2)
    assert found.training == pytest.approx(10 / 16)


@pytest.mark.parametrize(("train", "seconds"), [(10.0, 10 + 0.5), (2.0, 4 + 1)])
def test_staleness_hides_the_shorter_of_both(train: float, seconds: float) -> None:
    found = outcome(Mode("stale", True, 1), train, load=1.0, wire=0.5)
    assert found.seconds == pytest.approx(seconds)
    assert (found.stale, found.age, found.oldest) == (1, 1, 1)


def test_in_flight_weights_lower_the_age() -> None:
    """A batch lasts 8 s and training 2 s, so six of eight tokens are written by the newest weights."""
    found = outcome(Mode("in flight", True, 1, in_flight=True), 2.0, lengths=(8,))
    assert found.seconds == 8
    assert found.stale == pytest.approx(2 / 8)


def test_a_long_response_goes_on_in_the_next_steps() -> None:
    """One of two responses is taken. Five batches: b was complete before (0 s); c and d take 2 s; d was
    complete (0 s); f ends after 2 s, with 2 tokens of e, which is a batch older; e is due and ends after 7 s with g."""
    found = outcome(Mode("partial", oversample=2.0), 1.0, lengths=(2, 2, 2, 2, 9))
    assert found.seconds == pytest.approx(1 + (0 + 2 + 0 + 2 + 7) / 5)
    assert found.oldest == 1
    assert found.stale == found.age == pytest.approx((2 + 2 + 2) / 17)  # b, d, and e's first tokens
