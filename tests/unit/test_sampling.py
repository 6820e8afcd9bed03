"""Assignment of weights to batches, and selection of the responses to train on."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_aspo.batch import Batch, MicroBatch, Prompt, Sample
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.rewards import RewardConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.journal.clock import Clock
from megatron_aspo.policy.packing import pack
from megatron_aspo.ranks.exchange import pack_arrays
from megatron_aspo.rewards.scoring import Scorer
from megatron_aspo.rewards.verdict import Verdict
from megatron_aspo.rollout import batches as batches_module
from megatron_aspo.rollout.batches import Batches, sample_batch
from megatron_aspo.rollout.remote import RemoteEngine
from megatron_aspo.rollout.table import to_table
from megatron_aspo.rollout.weight_lanes import WeightSender
from megatron_aspo.rollout.weight_sync import WeightSyncError

UPDATES = 3
"""Updates per step."""


@dataclass
class SlowRanks:
    """A channel to rollout ranks, which work only while the policy waits for a reply. A batch takes one prompt."""

    position: int = 0
    weight_version: int = -1
    messages: deque[Any] = field(default_factory=lambda: deque([("ready",)]))
    requests: int = 0
    most_waiting: int = 0

    def send(self, message: Any) -> None:
        self.messages.append(message)
        waiting = self.messages.count(("sample_batch",))
        self.requests += message == ("sample_batch",)
        self.most_waiting = max(self.most_waiting, waiting)

    @property
    def lanes(self) -> Any:
        return SimpleNamespace(others=1, receive=lambda sender, buffer, tag: buffer.copy_(self.arrays))

    def receive(self, everywhere: bool = True) -> Any:
        while True:
            match self.messages.popleft():
                case "refit", version:
                    self.weight_version = version
                case "set_stream", state:
                    (self.position,) = state["positions"]
                case ("ready",):
                    return None
                case ("sample_batch",):
                    self.position += 1
                    prompt, tokens, logprobs = Prompt(self.position, "", (1,), {}), np.ones(1, np.int32), np.zeros(1)
                    sample = Sample(
                        prompt, 0, tokens, "stop", self.weight_version, logprobs.astype(np.float32), owner=0
                    )
                    self.arrays = pack_arrays([sample])
                    batch = Batch([], {}, {"positions": [self.position]}, 0.0, 0.0, self.weight_version)
                    return batch, [1], to_table([sample]), [], False


@dataclass
class Stream:
    """State of a prompt stream."""

    position: int = 0

    def state_dict(self) -> dict[str, list[int]]:
        return {"positions": [self.position]}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        (self.position,) = state["positions"]

    def draw(self, count: int) -> list[Prompt]:
        self.position += count
        return [Prompt(self.position - i, "", (1,), {}) for i in reversed(range(count))]


class Run:
    """Batches of steps done + 1 to 10, from rollout ranks."""

    def __init__(
        self, stream: Stream, max_staleness: int, done: int, version: int, saved: Sequence[Batch] = ()
    ) -> None:
        config = RolloutConfig(engine="vllm", ranks=1, max_staleness=max_staleness)
        self.policy: Any = SimpleNamespace(weight_version=version)
        self.ranks: Any = SlowRanks()
        self.engine = RemoteEngine(self.policy, config, self.ranks, AsciiTokenizer())
        self.batches = Batches(self.policy, self.engine, stream, None, config, done, 10, saved)  # type: ignore[arg-type]
        self.engine.refit()


@pytest.fixture(scope="module", autouse=True)
def _a_world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightSender, "send", lambda self: self._channel.send(("refit", self._source.weight_version)))


def take_steps(
    stream: Stream,
    max_staleness: int,
    done: int,
    stop: int,
    saved: Sequence[Batch] = (),
    updates: Callable[[int], int] = lambda step: UPDATES,
) -> tuple[list[Batch], Run]:
    """Batches of steps done + 1 to `stop` of 10, and the run. `updates` maps a step to its updates."""
    run = Run(stream, max_staleness, done, sum(updates(step) for step in range(1, done + 1)), saved)
    taken: list[Batch] = []
    for step in range(done + 1, stop + 1):
        taken.append(run.batches.next(Clock()))
        assert len(run.batches._ahead) == min(max_staleness, 10 - step)
        assert stream.position == step
        run.policy.weight_version += updates(step)
        run.engine.refit()
    return taken, run


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3, 20])
@pytest.mark.parametrize("skipping", [False, True])
def test_the_weights_after_step_n_minus_1_minus_k_write_batch_n(max_staleness: int, skipping: bool) -> None:
    """This holds even if all updates of a step are skipped, which leaves its weights at the previous step's version."""

    def updates(step: int) -> int:
        return 0 if skipping and step % 3 == 2 else UPDATES

    taken, run = take_steps(Stream(), max_staleness, 0, 10, updates=updates)
    writers = [max(0, n - 1 - max_staleness) for n in range(1, 11)]
    version_after = [sum(updates(i) for i in range(1, step + 1)) for step in range(11)]
    assert [batch.groups[0][0].weight_version for batch in taken] == [version_after[step] for step in writers]
    assert [batch.groups[0][0].prompt.id for batch in taken] == list(range(1, 11))
    assert [batch.metrics for batch in taken] == [
        {
            "rollout/staleness": n - 1 - writer,
            "rollout/staleness_updates": version_after[n - 1] - version_after[writer],
        }
        for n, writer in enumerate(writers, 1)
    ]
    assert run.ranks.requests == 10  # every sampled batch is trained on
    assert run.ranks.most_waiting <= max_staleness + 1
    assert run.batches.ahead() == []


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3])
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_run_goes_on_with_the_batches_that_were_ahead(max_staleness: int, stop: int) -> None:
    expected, _ = take_steps(Stream(), max_staleness, 0, 10)
    stream = Stream()
    before, stopped = take_steps(stream, max_staleness, 0, stop)
    ahead = stopped.batches.ahead()
    assert len(ahead) == min(max_staleness, 10 - stop)
    assert stream.position == stop  # a run that cannot use the batches starts here
    after, resumed = take_steps(stream, max_staleness, stop, 10, copy.deepcopy(ahead))
    assert before + after == expected
    assert resumed.ranks.requests == 10 - stop - len(ahead)


def test_a_batch_from_other_weights_is_refused() -> None:
    run = Run(Stream(), 1, 0, version=5)
    run.policy.weight_version = 6  # without a refit
    with pytest.raises(WeightSyncError, match=r"version 5 .* version 6"):
        run.batches.next(Clock())


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects messages of `warn`, which needs a process group."""
    messages: list[str] = []
    monkeypatch.setattr(batches_module, "warn", messages.append)
    return messages


def test_batches_too_stale_for_the_configuration_are_sampled_again(warnings: list[str]) -> None:
    stream = Stream()
    ahead = take_steps(stream, 2, 0, 5)[1].batches.ahead()
    assert Run(stream, 0, 5, 5 * UPDATES, ahead).batches.ahead() == []
    (message,) = warnings
    assert "2 batch(es)" in message
    assert "rollout.max_staleness=0" in message


@pytest.mark.parametrize(("setting", "value"), [("oversample", 1.0), ("max_staleness", 0)])
def test_groups_in_progress_are_not_lost(setting: str, value: float) -> None:
    ahead, config = take_steps(Stream(), 2, 0, 5)[1].batches.ahead(), RolloutConfig(engine="vllm", ranks=1)
    config = replace(config, **({"oversample": 1.5, "max_staleness": 2} | {setting: value}))
    with pytest.raises(UserError, match=rf"has 3 unfinished groups .* lost with rollout.{setting}={value:g}; set "):
        Batches(None, None, Stream(), None, config, 5, 10, ahead, {"groups": [1, 2, 3]})  # type: ignore[arg-type]


class Prompts(Stream):
    overlong = 0
    config = DataConfig()

    def draw(self, count: int) -> list[Prompt]:
        return [Prompt(i, "", (1,), {}, "test_sampling:half_right") for i in range(count)]


class Writer:
    """An engine that writes responses of 4, 5, 6, ... tokens with weights of `version`. Those in `unjudged` consist
    of `token`, others of 1."""

    version = 2

    def __init__(self, cut: int = 8, unjudged: Sequence[int] = (), token: int = 1) -> None:
        self.cut, self.unjudged, self.token = cut, unjudged, token

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int
    ) -> list[Sample]:
        return [
            Sample(
                prompt,
                first_group + i,
                np.full(n, self.token if n in self.unjudged else 1),
                "length" if n >= self.cut else "stop",
                weight_version=self.version,
                text=str(n),
            )
            for i, prompt in enumerate(prompts)
            for n in range(4, 4 + responses_per_prompt)
        ]


class Judge:
    """Scores responses below 7 tokens as right; those of 4 and 9 tokens get no verdict."""

    def submit(self, sample: Sample) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        length = len(sample.token_ids)
        future.set_result(
            Verdict(0.0, "worker died", error=True) if length in (4, 9) else Verdict(float(length < 7), "")
        )
        return future

    def close(self) -> None:
        pass


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("stop", [None, 1, 5])
def test_batches_are_as_old_without_rollout_ranks(max_staleness: int, stop: int | None) -> None:
    """The training ranks sample ahead; a run that stops goes on with what they have sampled."""
    config = RolloutConfig(max_staleness=max_staleness, prompts_per_step=3, responses_per_prompt=6, batch_size=1)
    policy: Any = SimpleNamespace(weight_version=0)
    writer, stream = Writer(), Numbered()
    saved: list[Batch] = []
    with Scorer(DataConfig(path="-", reward="math"), RewardConfig(), config, Judge()) as scorer:

        def batches(done: int) -> Batches:
            return Batches(policy, writer, stream, scorer, config, done, 8, saved)  # type: ignore[arg-type]

        run = batches(0)
        for step in range(1, 9):
            writer.version = policy.weight_version
            batch = run.next(Clock())
            first, written_after = 3 * (step - 1), max(0, step - 1 - max_staleness)
            assert [group[0].prompt.id for group in batch.groups] == [first, first + 1, first + 2]
            assert {sample.weight_version for group in batch.groups for sample in group} == {UPDATES * written_after}
            age = UPDATES * (step - 1 - written_after)
            assert batch.metrics.get("rollout/staleness_updates") == (age if max_staleness else None)
            assert stream.position == 3 * step
            policy.weight_version += UPDATES
            if step == stop:
                saved = copy.deepcopy(run.ahead())
                run = batches(step)


class Numbered(Stream):
    """Endless prompts, numbered from 0."""

    overlong = 0
    config = DataConfig()

    def draw(self, count: int) -> list[Prompt]:
        self.position += count
        return [Prompt(self.position - i - 1, "", (1,), {}, "-") for i in reversed(range(count))]


def half_right(response: str, row: dict[str, Any]) -> bool:
    return int(response) < 7


def sampled(writer: Writer, reward: Any = None, advantage: str = "grpo", **section: Any) -> Batch:
    """A batch of three prompts with six responses each."""
    config = replace(
        RunConfig("t"),
        rollout=RolloutConfig(prompts_per_step=3, responses_per_prompt=6, max_response_tokens=9, advantage=advantage),
        data=DataConfig(path="-", reward="test_sampling:half_right"),
        reward=RewardConfig(**section),
    )
    with Scorer(config.data, config.reward, config.rollout, reward) as scorer:
        return sample_batch(writer, Prompts(), scorer, config.rollout, Clock())  # type: ignore[arg-type]


@pytest.mark.parametrize(("filtered", "lengths"), [(False, [4, 5, 6, 7, 8, 9]), (True, [4, 5, 6, 7])])
def test_responses_that_were_cut_can_be_kept_out_of_the_loss(filtered: bool, lengths: list[int]) -> None:
    batch = sampled(Writer(), overlong_filter=filtered)
    assert batch.weight_version == 2
    assert [[len(s.token_ids) for s in group] for group in batch.groups] == [lengths] * 3
    assert batch.metrics.get("rollout/overlong_filtered") == (6 if filtered else None)
    # Mean and deviation are over all six responses, of which three are right.
    assert [s.advantage for s in batch.groups[0]][:4] == pytest.approx(
        [0.5 / 0.3**0.5] * 3 + [-0.5 / 0.3**0.5], rel=1e-5
    )


def test_a_step_whose_responses_were_all_cut_has_no_groups(warnings: list[str]) -> None:
    batch = sampled(Writer(cut=0), overlong_filter=True)
    assert batch.groups == []
    assert batch.metrics["rollout/groups_kept"] == 3
    assert batch.metrics["rollout/overlong_filtered"] == 18
    (message,) = warnings
    assert "rollout.max_response_tokens=9" in message


def test_responses_without_a_verdict_are_not_trained_on() -> None:
    packed: list[list[MicroBatch]] = []
    for token in (1, 7):
        batch = sampled(Writer(unjudged=(4, 9), token=token), Judge())
        assert [[len(s.token_ids) for s in group] for group in batch.groups] == [[5, 6, 7, 8]] * 3
        # Two right of four: the mean is 1/2 and the deviation the root of 1/3.
        half = 0.5 / (3**-0.5 + 1e-6)
        assert [s.advantage for s in batch.groups[0]] == pytest.approx([half, half, -half, -half])
        assert batch.metrics["reward/unjudged"] == pytest.approx(1 / 3)
        assert batch.metrics["reward/accuracy"] == 1 / 2
        samples = [sample for group in batch.groups for sample in group]
        packed.append(pack(samples, dp_rank=0, dp_size=1, max_tokens=1024))
    for one, other in zip(*packed, strict=True):
        assert one.loss_mask.sum() == 3 * (5 + 6 + 7 + 8)
        for name in ("tokens", "labels", "loss_mask", "advantages"):
            assert torch.equal(getattr(one, name), getattr(other, name))


class Uneven(Judge):
    """Responses of 4, 5, ... tokens are right, 2 i of those to prompt i; responses of 9 tokens get no verdict."""

    def submit(self, sample: Sample) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        length = len(sample.token_ids)
        error = Verdict(0.0, "worker died", error=True)
        future.set_result(error if length == 9 else Verdict(float(length < 4 + 2 * sample.prompt.id), ""))
        return future


def test_statistics_of_the_batch_are_over_what_is_trained_on() -> None:
    """Prompt 0 has no signal, and of the others six of ten responses with a verdict are right."""
    batch = sampled(Writer(), Uneven(), "reinforce++")
    deviation = (10 * 0.6 * 0.4 / 9) ** 0.5 + 1e-6
    right, wrong = 0.4 / deviation, -0.6 / deviation
    assert [[s.advantage for s in group] for group in batch.groups] == [
        pytest.approx([right] * 2 + [wrong] * 3),
        pytest.approx([right] * 4 + [wrong]),
    ]


def test_a_run_ends_when_too_many_responses_have_no_verdict() -> None:
    with pytest.raises(RunError, match=r"6 of 18 .*worker died.*max_unjudged=0\.3"):
        sampled(Writer(), Judge(), max_unjudged=0.3)
