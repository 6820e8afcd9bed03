"""The reference policy of the KL term: weights in host memory, exchanged with the policy's for a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn


class ReferenceWeights:
    """A copy of the model's weights at construction, in host memory (pinned if there is a GPU).

    Attributes:
        in_place: whether the model holds the reference weights now, and host memory the policy's.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        pinned = torch.cuda.is_available()
        self._host = [torch.empty(p.shape, dtype=p.dtype, device="cpu", pin_memory=pinned) for p in self._parameters]
        self.in_place = False
        for parameter, host in zip(self._parameters, self._host, strict=True):
            host.copy_(parameter.detach())

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Exchange the weights, and exchange them back at the end. Each exchange moves all weights over the bus in
        both directions."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap the contents. One stream orders the three copies, and the device holds one tensor more at a time."""
        for parameter, host in zip(self._parameters, self._host, strict=True):
            current = parameter.clone()
            parameter.copy_(host, non_blocking=True)
            host.copy_(current, non_blocking=True)
            del current  # before the next tensor is copied
        self.in_place = not self.in_place
