"""Router replay: updates send every token to the experts that the pass for the old log-probs sent it to.

Without it an update's own routing differs as soon as the weights have moved. The importance ratio of such a token
compares two sets of experts, and jumps. With `train.router_replay=trainer` the pass for the old log-probs chooses the
experts (R2 in the literature). With `sampler` it takes those of the rollout engine (`Sample.routes`, R3), whose kernels
round differently: it compares log-probs of the same experts too. Megatron-Core implements the part inside the router
(`moe_enable_routing_replay`).
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import megatron.core.transformer.moe.router as mcore_router
import torch
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from torch import Tensor

from megatron_aspo.batch import MicroBatch


def choose_in_one_order() -> None:
    """Let routers sort the chosen experts by score in passes without gradients, too. Idempotent.

    Megatron-Core 0.19.2 sorts them only where gradients are made. Elsewhere the weights of three or more experts are
    summed in another order, so that old log-probs differ from those of the first update. Nothing in the function needs
    a gradient of a pass without: its inputs have none.
    """
    routing = mcore_router.topk_routing_with_score_function
    if not hasattr(routing, "__wrapped__"):
        mcore_router.topk_routing_with_score_function = torch.enable_grad()(routing)


class RouterReplay:
    """The routers in this rank's part of the model; none without `train.router_replay`.

    Attributes:
        layers: of each router, its index among all layers of the model that have experts.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._routers: list[Any] = []
        self._first: dict[Any, int] = {}  # chunk -> number of its first router
        for chunk in chunks:
            self._first[chunk] = len(self._routers)
            # Megatron's own list has the routers of every model that was ever built in the process.
            routers = [getattr(module, "router_replay", None) for module in chunk.modules()]
            self._routers += [router for router in routers if router is not None]
        frequency = getattr(chunks[0].config, "moe_layer_freq", 1)  # 1 puts experts in every layer
        dense = [i for i, f in enumerate(frequency) if not f] if isinstance(frequency, list) else []
        numbers = [router.layer_number - 1 for router in self._routers]
        self.layers = [number - bisect.bisect(dense, number) for number in numbers]

    @contextlib.contextmanager
    def record_or_replay(self, batch: MicroBatch, chunk: Any) -> Iterator[None]:
        """Route the forward pass of a chunk within as `batch` was routed; the first time, record its routing in
        `batch`, behind that of the chunks before."""
        known = batch.routing or []
        if len(known) == self._first[chunk]:
            self._set(RouterReplayAction.RECORD)
            yield
            recorded = [router.get_recorded_indices() for router in self._routers[len(known) :]]
            batch.routing = known + [indices.to(torch.int16) for indices in recorded if indices is not None]
        else:
            self.replay(batch)
            yield
        self.stop()

    def replay(self, batch: MicroBatch) -> None:
        """Route later passes as `batch` was routed; freely if no routing was recorded, as in the warm-up."""
        self.stop()
        if batch.routing:
            self._set(RouterReplayAction.REPLAY_FORWARD)
            for router, indices in zip(self._routers, batch.routing, strict=True):
                router.set_target_indices(indices.long())

    def replay_in_backward(self, batch: MicroBatch, output: Tensor) -> None:
        """Replay also in the layers that the backward pass of `output` recomputes: between the two passes a pipeline
        stage runs other micro-batches."""
        if batch.routing:
            output.register_hook(lambda _: self.replay(batch))

    def stop(self) -> None:
        """Let every router choose by itself again."""
        for router in self._routers:
            router.clear_indices()
            router.clear_router_replay_action()

    def _set(self, action: RouterReplayAction) -> None:
        for router in self._routers:
            router.set_router_replay_action(action)
