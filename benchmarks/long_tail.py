"""Responses of very unequal lengths on a simulated clock: what staleness, partial rollouts and in-flight updates gain.

`python benchmarks/long_tail.py` writes the table and the picture of docs/lab/long-tail.md. Nothing here is measured: a
decoding step takes the time of `planning.engine`, training that of the model's operations at a rehearsed utilisation.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np

from megatron_aspo.config.load import load_config
from megatron_aspo.tools.planning.engine import (
    DECODE_FLOPS,
    active_parameters,
    decode_step_seconds,
    engine_parameters,
    kv_bytes_per_token,
)
from megatron_aspo.tools.planning.gpus import GIB
from megatron_aspo.tools.planning.plan import make_plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/lab/long-tail.md"
PICTURE = ROOT / "docs/lab/long_tail.png"
MARKERS = "<!-- python benchmarks/long_tail.py -->\n", "<!-- end -->\n"

RECIPE = ROOT / "examples/qwen3_32b.yaml"
GROUP, PROMPT = 16, 512
MEDIAN, SIGMA, CAP = 2048, 1.0, 16384
"""Response lengths: log-normal; 1.9 % reach the cap."""
SHARED = 0.5
"""Share of the variance of log-lengths that a prompt's responses have in common."""
UTILISATION = (0.41, 0.28)
"""Best and worst rehearsed utilisation of the recipe's updates (docs/scale.md)."""
SHARDS = 16
"""GPUs of one copy of the model that trains: tensor 4 x pipeline 4."""
WARM, STEPS = 4, 12
"""Steps before the measured ones, and measured."""


# --- Sampling.


@dataclass(eq=False)
class Response:
    """A response that is being written.

    Attributes:
        length: its tokens when it is complete.
        spans: (weight version, tokens) written so far.
    """

    length: int
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def written(self) -> int:
        return sum(tokens for _, tokens in self.spans)


@dataclass(eq=False)
class Unit:
    """Responses that are taken together: a group in partial rollouts, otherwise one response.

    Attributes:
        started: the batch in which it began.
    """

    started: int
    responses: list[Response]

    @property
    def is_complete(self) -> bool:
        return all(response.written == response.length for response in self.responses)


@dataclass(eq=False)
class Replica:
    """A copy of the engine that decodes at most `slots` responses at once, one token each per step.

    Attributes:
        seconds_of: seconds of a step by the number of running responses and of tokens in the cache.
        prefill: seconds per token of a prompt and of what a continued response had before.
        steps: taken so far.
        occupied: seconds in which responses run, summed over the responses.
        units: in work, in the order of their start.
        running: a heap of (step of the end, order, response, step since which it is written by the current weights).
    """

    slots: int
    seconds_of: Callable[[int, float], float]
    prefill: float = 0.0
    clock: float = 0.0
    version: int = 0
    steps: int = 0
    cached: float = 0.0
    occupied: float = 0.0
    units: list[Unit] = field(default_factory=list)
    waiting: deque[Response] = field(default_factory=deque)
    running: list[tuple[int, int, Response, int]] = field(default_factory=list)

    def sample(
        self, wanted: int, due: int = -1, updates: Sequence[tuple[float, int]] = (), load: float = 0.0
    ) -> list[Response]:
        """Decode until `wanted` units are complete, and all that began in batch `due` or before it. Return the
        responses of the first `wanted` complete units; all others stay.

        Args:
            updates: (time, version) of weights that arrive meanwhile; the replica stands still for `load` seconds.
        """
        left = {id(unit): sum(r.written < r.length for r in unit.responses) for unit in self.units}
        owner = {id(response): unit for unit in self.units for response in unit.responses}
        complete = sum(not count for count in left.values())
        late = sum(unit.started <= due and left[id(unit)] > 0 for unit in self.units)
        self.waiting = deque(r for unit in self.units for r in unit.responses if r.written < r.length)
        coming = deque(updates)
        self._admit()
        while complete < wanted or late:
            steps = self.running[0][0] - self.steps
            if coming and coming[0][0] <= self.clock + self._seconds(steps):
                arrival, version = coming.popleft()
                whole = bisect.bisect_right(range(steps + 1), arrival - self.clock, key=self._seconds) - 1
                self._decode(max(0, whole))  # or it came during a prefill
                self.clock = max(self.clock, arrival)
                self.update(version, load)
                continue
            self._decode(steps)
            _, _, response, since = heapq.heappop(self.running)
            response.spans.append((self.version, self.steps - since))
            self.cached -= PROMPT + response.written
            unit = owner[id(response)]
            left[id(unit)] -= 1
            if not left[id(unit)]:
                complete += 1
                late -= unit.started <= due
            self._admit()
        self._close_spans()
        self.running, self.cached = [], 0.0
        taken = [unit for unit in self.units if unit.is_complete][:wanted]
        self.units = [unit for unit in self.units if unit not in taken]
        return [response for unit in taken for response in unit.responses]

    def update(self, version: int, seconds: float) -> None:
        """Take weights, which takes `seconds`; what runs goes on with its cache."""
        self._close_spans()
        self.version = version
        self.clock += seconds

    def _admit(self) -> None:
        """Fill free slots with waiting responses."""
        while self.waiting and len(self.running) < self.slots:
            response = self.waiting.popleft()
            have = PROMPT + response.written
            end = self.steps + response.length - response.written
            heapq.heappush(self.running, (end, len(self.waiting), response, self.steps))
            self.cached += have
            self._spend(have * self.prefill)

    def _seconds(self, steps: int) -> float:
        """Seconds of `steps` steps without an end of a response; exact where a step's time is linear in the cache."""
        count = len(self.running)
        return steps * self.seconds_of(count, self.cached + count * (steps - 1) / 2)

    def _decode(self, steps: int) -> None:
        self._spend(self._seconds(steps))
        self.steps += steps
        self.cached += steps * len(self.running)

    def _spend(self, seconds: float) -> None:
        self.clock += seconds
        self.occupied += seconds * len(self.running)

    def _close_spans(self) -> None:
        for i, (end, order, response, since) in enumerate(self.running):
            if self.steps > since:
                response.spans.append((self.version, self.steps - since))
            self.running[i] = end, order, response, self.steps


# --- A run.


@dataclass(frozen=True)
class Mode:
    """A way to overlap sampling and training; settings of `RolloutConfig`.

    Attributes:
        separate: some GPUs only sample, and all others only train; else all GPUs do both in turn.
    """

    name: str
    separate: bool = False
    max_staleness: int = 0
    oversample: float = 1.0
    max_age: int = 2
    in_flight: bool = False


MODES = (
    Mode("exact, synchronous"),
    Mode("oversample 1.5", oversample=1.5),
    Mode("oversample 3", oversample=3),
    Mode("oversample 3, max_age 4", oversample=3, max_age=4),
    Mode("exact, max_staleness 1", True, 1),
    Mode("max_staleness 1, in flight", True, 1, in_flight=True),
    Mode("max_staleness 1, oversample 3", True, 1, 3),
    Mode("the same, in flight", True, 1, 3, in_flight=True),
)


@dataclass(frozen=True)
class Machine:
    """GPUs at one end of the assumed efficiencies.

    Attributes:
        replicas, slots, seconds_of, prefill: see `Replica`.
        train: seconds of a step's training by its tokens.
        load: seconds in which the engine takes weights.
        wire: seconds in which separate ranks that train send them.
    """

    replicas: int
    slots: int
    seconds_of: Callable[[int, float], float]
    prefill: float
    train: Callable[[float], float]
    load: float
    wire: float


@dataclass(frozen=True)
class Outcome:
    """Means over the measured steps.

    Attributes:
        slots: share of the engines' slots that are taken while there is a batch to sample.
        training: share of the time in which the GPUs that train do.
        stale: share of trained tokens that older weights than the trainer's wrote.
        age: of a trained token, in steps.
        oldest: of all.
    """

    seconds: float
    tokens: float
    slots: float
    training: float
    stale: float
    age: float
    oldest: int


def run(mode: Mode, machine: Machine, groups: int, draw: Callable[[int], Sequence[int]], steps: int) -> Outcome:
    """Simulate `steps` steps of `groups` groups, the first `WARM` of them unmeasured.

    Args:
        draw: returns the lengths of the responses to a prompt.
    """
    count = machine.replicas
    replicas = [Replica(machine.slots, machine.seconds_of, machine.prefill) for _ in range(count)]
    prompts = itertools.count()
    sampled: list[float] = []  # ends of the batches
    trained: list[float] = []  # ends of the steps, weights sent
    spent: list[tuple[float, float, float, float]] = []
    ages: list[tuple[int, int]] = []
    in_batches = 0.0
    for n in range(steps):
        behind = n - 1 - mode.max_staleness
        begin = max(sampled[-1] if sampled else 0.0, trained[behind] if behind >= 0 else 0.0)
        coming = [(trained[i], i + 1) for i in range(max(0, behind + 1), n) if mode.in_flight and trained[i] > begin]
        parts = [len(range(i, groups, count)) for i in range(count)]
        if mode.oversample == 1:  # requests go round to the replicas, whole groups only with `oversample`
            lengths = [length for _ in range(groups) for length in draw(next(prompts))]
            parts = [len(lengths[i::count]) for i in range(count)]
            for i, replica in enumerate(replicas):
                replica.units = [Unit(n, [Response(length)]) for length in lengths[i::count]]
        for replica, part in zip(replicas, parts, strict=True):
            for _ in range(math.ceil(mode.oversample * part) - len(replica.units)):
                replica.units.append(Unit(n, [Response(length) for length in draw(next(prompts))]))
        done: list[Response] = []
        for replica, part in zip(replicas, parts, strict=True):
            replica.clock = begin
            replica.update(max(0, behind + 1), machine.load if behind >= 0 else 0.0)
            done += replica.sample(part, n - mode.max_age, coming, machine.load)
        sampled.append(max(replica.clock for replica in replicas))
        in_batches += sampled[-1] - begin
        tokens = float(sum(PROMPT + response.length for response in done))
        training = machine.train(tokens)
        start = max(sampled[-1], trained[-1] if trained else 0.0)
        trained.append(start + training + (machine.wire if mode.separate else machine.load))
        spent.append((tokens, training, sum(replica.occupied for replica in replicas), in_batches))
        if n >= WARM:
            ages += [(n - version, size) for response in done for version, size in response.spans]
    (_, _, occupied0, batches0), (_, _, occupied1, batches1) = spent[WARM - 1], spent[-1]
    elapsed, measured = trained[-1] - trained[WARM - 1], spent[WARM:]
    written = sum(size for _, size in ages)
    return Outcome(
        seconds=elapsed / len(measured),
        tokens=fmean(tokens for tokens, *_ in measured),
        slots=(occupied1 - occupied0) / (batches1 - batches0) / (count * machine.slots),
        training=sum(training for _, training, *_ in measured) / elapsed,
        stale=sum(size for age, size in ages if age) / written,
        age=sum(age * size for age, size in ages) / written,
        oldest=max(age for age, _ in ages),
    )


# --- The measured cases.


@functools.cache
def lengths(seed: int, group: int) -> list[int]:
    """Tokens of the responses to a prompt."""
    rng = np.random.default_rng([seed, group])
    shared, own = rng.standard_normal(), rng.standard_normal(GROUP)
    tokens = MEDIAN * np.exp(SIGMA * (np.sqrt(SHARED) * shared + np.sqrt(1 - SHARED) * own))
    return [int(n) for n in np.clip(np.ceil(tokens), 1, CAP)]


def machine(gpus: int, sampling: int, end: int) -> Machine:
    """Qwen3-32B on H100, of which `sampling` only sample (0: all do both), at the best (0) or worst (1) efficiency."""
    from megatron_aspo.tools.rehearsal.simulation import networks
    from megatron_aspo.tools.rehearsal.step import forward_flops

    settings = [f"model.max_sequence_length={PROMPT + CAP}", f"rollout.max_response_tokens={CAP}"]
    settings += [f"train.max_tokens_per_micro_batch={PROMPT + CAP}", f"rollout.kv_cache_gb={50 if sampling else 24}"]
    plan = make_plan(load_config(RECIPE, settings))
    config, shape, gpu = plan.config, plan.shape, plan.gpu
    tensor, network = config.rollout.tensor, networks(gpu.name, 8)[end]
    mean = PROMPT + MEAN
    room = config.rollout.kv_cache_gb * GIB / (kv_bytes_per_token(shape, tensor) * mean)
    train_gpus, model = gpus - sampling, engine_parameters(shape, 1) * 2
    flops = 4 * forward_flops(shape, 1.0, mean) / (train_gpus * gpu.flops * UTILISATION[end])  # with old log-probs
    sent = model / min(train_gpus, sampling) if sampling else 0.0
    return Machine(
        replicas=(sampling or gpus) // tensor,
        slots=min(config.rollout.batch_size, int(room)),
        seconds_of=lambda running, cached: decode_step_seconds(config, shape, gpu, running, cached)[1 - end],
        prefill=2 * active_parameters(shape) / (tensor * gpu.flops * DECODE_FLOPS[1 - end]),
        train=lambda tokens: tokens * flops,
        load=model / network.bandwidth(tuple(range(sampling or gpus))),
        wire=sent / (network.between * network.share),
    )


MEAN = fmean(n for group in range(2000) for n in lengths(0, group))

CASES = {"32 GPUs, 1,024 responses": (32, 64), "256 GPUs, 4,096": (256, 256), "256 GPUs, 1,024": (256, 64)}
"""Case -> GPUs, and prompts per step."""

Found = tuple[int, list[Outcome]]
"""GPUs that only sample, and the outcomes at the best and the worst efficiencies."""


def measure(mode: Mode, gpus: int, prompts: int, steps: int = WARM + STEPS) -> Found:
    """Take the split with the shortest step; GPUs that train hold whole copies of the model."""

    def at(sampling: int) -> list[Outcome]:
        draw = functools.partial(lengths, 1)
        return [run(mode, machine(gpus, sampling, end), prompts, draw, steps) for end in (0, 1)]

    if not mode.separate:
        return 0, at(0)
    splits = {gpus * quarters // 4 // SHARDS * SHARDS for quarters in (1, 2, 3)} - {0, gpus}
    found = {sampling: at(sampling) for sampling in sorted(splits)}
    return min(found.items(), key=lambda item: sum(outcome.seconds for outcome in item[1]))


def table(results: dict[str, dict[str, Found]]) -> str:
    """Markdown; ranges are those of the efficiencies, and gains are over the first mode at the same efficiency."""
    columns = "case|mode|only sample|step, s|tokens/s/GPU|gain|slots, %|training, %|stale, %|age|oldest"
    lines = [f"|{columns}|", "|---" * 11 + "|"]
    for case, modes in results.items():
        first = next(iter(modes.values()))[1]
        for name, (sampling, ends) in modes.items():
            speeds = [end.tokens / end.seconds / CASES[case][0] for end in ends]
            gains = [old.seconds / old.tokens * end.tokens / end.seconds for old, end in zip(first, ends, strict=True)]
            cells = [_range([end.seconds for end in ends]), _range(speeds), _range(gains, "{:.2f}")]
            cells += [_range([100 * end.slots for end in ends]), _range([100 * end.training for end in ends])]
            cells += [_range([100 * end.stale for end in ends]), _range([end.age for end in ends], "{:.2f}")]
            cells += [str(max(end.oldest for end in ends))]
            lines.append(f"|{case}|{name}|{sampling or ''}|{'|'.join(cells)}|")
    return "\n".join(lines) + "\n"


def _range(ends: Sequence[float], form: str = "{:.0f}") -> str:
    low, high = (form.format(end) for end in (min(ends), max(ends)))
    return low if low == high else f"{low}-{high}"


def draw(results: dict[str, dict[str, Found]]) -> None:
    """Draw gain, taken slots and age by mode."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
    names = [mode.name for mode in MODES]
    for i, (case, colour) in enumerate(zip(results, ("#0072B2", "#56B4E9", "#E69F00"), strict=True)):
        modes = results[case]
        first = modes[names[0]][1]
        for j, name in enumerate(names):
            gains = [a.seconds / a.tokens * b.tokens / b.seconds for a, b in zip(first, modes[name][1], strict=True)]
            slots = [100 * end.slots for end in modes[name][1]]
            ages = [end.age for end in modes[name][1]]
            for axes, values in zip(panels, (gains, slots, ages), strict=True):
                low, high = min(values), max(values)
                label = case if not j else None
                axes.barh(j + (i - 1) * 0.27, low, 0.24, color=colour, label=label)
                axes.barh(j + (i - 1) * 0.27, high - low, 0.24, left=low, color=colour, alpha=0.45)
    for axes, title in zip(
        panels, ("Tokens/s/GPU over the first mode", "Slots taken, %", "Mean age, steps"), strict=True
    ):
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].axvline(1, color="black", lw=1, ls=":")
    panels[2].legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def main() -> int:
    results = {
        case: {mode.name: measure(mode, gpus, prompts) for mode in MODES} for case, (gpus, prompts) in CASES.items()
    }
    draw(results)
    before, _, rest = PAGE.read_text().partition(MARKERS[0])
    PAGE.write_text(before + MARKERS[0] + table(results) + MARKERS[1] + rest.partition(MARKERS[1])[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
