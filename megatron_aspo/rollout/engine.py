"""The interface of rollout engines, and the requests that the package's own engines make of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_aspo.batch import Prompt, Sample


class RolloutEngine(Protocol):
    """Samples responses from the policy. All ranks make the same calls in the same order."""

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        """Return `responses_per_prompt` samples of every prompt, in order, the same list on every rank.

        A user's engine returns whole samples everywhere. The package's own leave arrays and text of a sample to one of
        the ranks that wrote it (`Sample.owner`).

        Each sample has
        - `prompt` and `group`: the first prompt's group is `first_group`, and the next prompts count on from it;
        - `token_ids`: int32, 1 to `rollout.max_response_tokens` tokens, the end token included if there is one;
        - `text` and `finish_reason`;
        - `rollout_logprobs`: float32 [tokens], of the sampler's distribution;
        - `weight_version`: `policy.weight_version` of the weights that wrote it.

        Args:
            temperature: 0 is greedy.
        """
        ...

    def refit(self) -> None:
        """Load the policy's current weights. Called whenever they have changed."""
        ...

    def sleep(self) -> None:
        """Free memory until the next `refit`, which always precedes the next `generate`."""
        ...


Enough = Callable[[Collection[int]], bool]
"""Whether a batch ends, given the indices of the requests that have ended; called before the first step and whenever
a request has ended."""


@dataclass(frozen=True)
class Response:
    """A whole response, or the beginning of one that goes on in a later batch.

    Attributes:
        token_ids: int32 [n]; an unfinished response may have none.
        logprobs: float32 [n], of the sampler's distribution.
        versions: int32 [n], of the weights that wrote each token, or `OBSERVATION`.
        routes: as in `Sample`, [prompt + n - 1, layers, top k]; an observation at the end has none yet.
        finish_reason: None if the response is unfinished.
        score: as `Sample.environment_score`.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    routes: npt.NDArray[np.uint8] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    score: float | None = None

    @property
    def turns(self) -> list[npt.NDArray[np.int32]]:
        """The tokens of each part that the policy wrote. The first part is always its own."""
        return np.split(self.token_ids, np.flatnonzero(np.diff(self.versions >= 0)) + 1)[::2]

    @property
    def written_length(self) -> int:
        """Number of tokens that the policy wrote."""
        return int((self.versions >= 0).sum())

    def after(self, prefix: Response) -> Response:
        """Join what was written to the tokens that it continues. `routes` are of the whole sequence and stay those of
        the weights that wrote each token."""
        routes = self.routes
        if routes is not None and prefix.routes is not None:
            routes = np.concatenate([prefix.routes, routes[len(prefix.routes) :]])
        return Response(
            np.concatenate([prefix.token_ids, self.token_ids]),
            np.concatenate([prefix.logprobs, self.logprobs]),
            np.concatenate([prefix.versions, self.versions]),
            routes,
            self.finish_reason,
        )

    def sample(self, prompt: Prompt, group: int, text: str) -> Sample:
        """The finished response as a sample."""
        assert self.finish_reason is not None
        version = int(self.versions[self.versions >= 0].min())
        return Sample(
            prompt=prompt,
            group=group,
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            weight_version=version,
            rollout_logprobs=self.logprobs,
            text=text,
            versions=None if (self.versions == version).all() else self.versions,
            routes=self.routes,
            environment_score=self.score,
        )


NOTHING = Response(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32))
"""An unfinished response without tokens."""


@dataclass(frozen=True)
class Request:
    """One response to sample: the `replica`-th of its prompt, at place `index` of the list that `generate` returns.

    Attributes:
        prefix: the beginning of the response, which an engine continues.
    """

    index: int
    prompt: Prompt
    group: int
    replica: int
    prefix: Response = NOTHING

    @property
    def written(self) -> list[int]:
        """Response tokens that exist already."""
        return self.prefix.token_ids.tolist()

    @property
    def turn(self) -> int:
        """Number of them before the turn that is to be written or continued; only the turn's own tokens end it."""
        observed = np.flatnonzero(self.prefix.versions < 0)
        return int(observed[-1]) + 1 if len(observed) else 0

    def seed_sequence(self, *entropy: int, written: int = 0) -> np.random.SeedSequence:
        """Seed from `entropy`, the prompt, `replica` and the number of response tokens `written` alone: independent of
        batch, layout and point of resumption."""
        # Held-out prompts have negative ids, which SeedSequence rejects.
        seed = [*entropy, self.prompt.id & 0xFFFFFFFF, self.prompt.id < 0, self.replica]
        return np.random.SeedSequence([*seed, written] if written else seed)


def make_requests(prompts: Sequence[Prompt], responses_per_prompt: int, first_group: int) -> list[Request]:
    """One request per response, in the order of the samples that `generate` returns."""
    return [
        Request(i * responses_per_prompt + k, prompt, first_group + i, k)
        for i, prompt in enumerate(prompts)
        for k in range(responses_per_prompt)
    ]


def deal_out(writers: Sequence[Sequence[int]], count: int) -> list[int]:
    """Owners of `count` responses that the replicas write in turn; the `writers` of a replica own them in turn."""
    numbers = (divmod(i, len(writers)) for i in range(count))
    return [writers[replica][number % len(writers[replica])] for number, replica in numbers]
