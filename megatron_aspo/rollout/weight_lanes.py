"""Weights on their way from training ranks to rollout ranks.

Every training rank sends its share of the model over its lanes, in buckets. A rollout rank stages its lanes' buckets in
host memory while it samples, and passes them on within its role when the refit's turn comes. One copy of the model
crosses, and a rollout rank holds only its lanes' part of the versions that wait.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.errors import RunError
from megatron_aspo.ranks.channel import Channel
from megatron_aspo.ranks.gathering import gather_objects
from megatron_aspo.ranks.lanes import END, WEIGHTS
from megatron_aspo.rollout.weight_sync import Checksum, PolicyWeights, Weight, check_layout, checksum

_FOREVER = timedelta(days=3650)
"""Limit of the wait for the next refit: sampling and training of several steps, and evaluations, may lie before it."""

_ALIGNMENT = 16
"""Bytes to which tensors in a bucket are aligned, so that the bucket can be viewed as their types."""


class Bucket(NamedTuple):
    """Tensors that are sent together.

    Attributes:
        place: among all buckets. vLLM finishes a layer when it has all of it, so a pipeline stage's buckets are loaded
            together.
        sender, receiver: ranks, numbered within their roles.
    """

    place: tuple[int, int]
    sender: int
    receiver: int
    tensors: dict[str, Checksum]


class WeightSender:
    """Sends the policy's weights. All training ranks make the same calls."""

    def __init__(self, source: PolicyWeights, channel: Channel, bucket_bytes: int, with_checksums: bool) -> None:
        self._source, self._channel = source, channel
        self._bucket_bytes, self._with_checksums = bucket_bytes, with_checksums
        self._sent: dict[str, Checksum] = {}
        self._on_the_way: deque[Future[None]] = deque()

    def send(self) -> None:
        """Return when every bucket is on its way; does not wait until the rollout ranks load it. A rank holds two
        buckets: one is filled while the one before is on its way.

        Raises:
            WeightSyncError: a tensor is missing, new, or of another type or shape than the last time.
            PeerLostError: the rollout ranks have ended.
        """
        version, lanes, first = self._source.weight_version, self._channel.lanes, not self._sent
        self._channel.send(("refit", version))
        buckets: list[Bucket] = []
        error: BaseException | None = None  # raised by all ranks, when all have done their part of the export
        for tensors, flat in packed(self._source.share(), self._bucket_bytes, lanes.device, self._with_checksums):
            peer = lanes.peers[len(buckets) % len(lanes.peers)]
            lanes.send(peer, torch.tensor([version, flat.numel()]), WEIGHTS)
            self._on_the_way.append(lanes.send(peer, flat, WEIGHTS))
            buckets.append(Bucket((self._source.stage, len(buckets)), dist.get_rank(), peer, tensors))
            while len(self._on_the_way) > 1:
                error = self._on_the_way.popleft().exception() or error
        sent = _checksums(buckets)
        try:
            check_layout(sent, self._sent)
        except RunError as different:
            error = error or different
        self._sent = sent
        reports = gather_objects((error, buckets if first or self._with_checksums else []))
        for error, _ in reports:
            if error is not None:
                raise error
        gathered = sorted(bucket for _, of_rank in reports for bucket in of_rank)
        if first:
            self._channel.send(gathered)
        if self._with_checksums:
            self._channel.send(_checksums(gathered))


class ReceivedWeights:
    """Weights that the training ranks send. All rollout ranks make the same calls.

    Attributes:
        weight_version: version of the weights that come next.
        sent_checksums: the sender's, once `weights` is exhausted; empty without checksums.
    """

    def __init__(self, channel: Channel, with_checksums: bool) -> None:
        self.weight_version = -1
        self.sent_checksums: Mapping[str, Checksum] = {}
        self._channel, self._with_checksums = channel, with_checksums
        self._layout: list[Bucket] = []
        self._staged: dict[int, queue.Queue[Any]] = {}
        self._threads: list[threading.Thread] = []
        self._one_bucket = threading.Lock()

    def weights(self) -> Iterator[Weight]:
        """Yield every tensor whole, on every rank and in the same order. Tensors of a bucket share memory.

        Raises:
            PeerLostError: the training ranks have ended.
        """
        for peer in self._channel.lanes.peers if not self._staged else ():
            self._staged[peer] = queue.Queue()
            # Daemons: a rank that fails ends while the training ranks go on.
            thread = threading.Thread(target=self._stage, args=(peer,), name=f"weights {peer}", daemon=True)
            thread.start()
            self._threads.append(thread)
        if not self._layout:
            self._layout = self._channel.receive()
        for bucket in self._layout:
            yield from unpacked(self._next(bucket), bucket.tensors)
        if self._with_checksums:
            self.sent_checksums = self._channel.receive()

    def close(self) -> None:
        """Return when nothing waits for weights any more. The training ranks must be closing the channel."""
        for thread in self._threads:  # one that is inside torch when Python ends would abort the process
            thread.join()

    @property
    def is_staged(self) -> bool:
        """Whether this rank has its part of the next version. Must not be called before the first refit."""
        parts = Counter(bucket.sender for bucket in self._layout if bucket.receiver == dist.get_rank())
        return all(self._staged[sender].qsize() >= count for sender, count in parts.items())

    def _stage(self, peer: int) -> None:
        """Receive a lane's buckets as they come, in a thread. NCCL would occupy the GPU while it waits for a bucket, so
        a header announces each over gloo."""
        lanes, staged = self._channel.lanes, self._staged[peer]
        on_gpu = lanes.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(lanes.device)
            torch.cuda.set_stream(torch.cuda.Stream())  # not vLLM's, whose kernels would have to end first
        header = torch.empty(2, dtype=torch.int64)
        try:
            while True:
                version, size = lanes.receive(peer, header, WEIGHTS, _FOREVER).tolist()
                if [version, size] == END.tolist():
                    return
                with self._one_bucket:  # beside vLLM's caches
                    flat = lanes.receive(peer, torch.empty(size, dtype=torch.uint8, device=lanes.device), WEIGHTS)
                    flat = torch.empty_like(flat, device="cpu", pin_memory=True).copy_(flat) if on_gpu else flat
                staged.put((version, flat))
                del flat
        except Exception as error:
            staged.put(error if isinstance(error, RunError) else RunError(f"weights could not be staged: {error}"))

    def _next(self, bucket: Bucket) -> Tensor:
        """Return the bucket's bytes on every rank."""
        flat = error = None
        if bucket.receiver == dist.get_rank():
            staged = self._staged[bucket.sender].get()
            if isinstance(staged, RunError):
                error = staged
            else:
                version, flat = staged
                assert version == self.weight_version, f"a bucket of version {version}, not {self.weight_version}"
        if (error := self._channel.share(error, bucket.receiver)) is not None:
            raise error
        device = self._channel.lanes.device
        flat = torch.empty(_size(bucket.tensors), dtype=torch.uint8, device=device) if flat is None else flat.to(device)
        if dist.get_world_size() > 1:
            dist.broadcast(flat, src=bucket.receiver)
        return flat


def packed(
    weights: Iterable[Weight], limit: int, device: torch.device, with_checksums: bool
) -> Iterator[tuple[dict[str, Checksum], Tensor]]:
    """Copy consecutive tensors into buckets of at most `limit` bytes; a larger tensor is alone.

    Yields:
        The bucket's tensors, and its bytes.
    """
    tensors: dict[str, Checksum] = {}
    flat, used = torch.empty(0), 0
    for name, tensor in weights:
        if tensors and used + _padded(tensor.nbytes) > limit:
            yield tensors, flat[:used]
            tensors = {}
        if not tensors:
            del flat
            flat, used = torch.empty(max(limit, _padded(tensor.nbytes)), dtype=torch.uint8, device=device), 0
        flat[used : used + tensor.nbytes].copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
        used += _padded(tensor.nbytes)
        tensors[name] = checksum(tensor, with_checksums)
    if tensors:
        yield tensors, flat[:used]


def unpacked(flat: Tensor, tensors: Mapping[str, Checksum]) -> Iterator[Weight]:
    """Views of a bucket's tensors."""
    start = 0
    for name, (dtype, shape, *_) in tensors.items():
        size = shape.numel() * dtype.itemsize
        yield name, flat[start : start + size].view(dtype).view(shape)
        start += _padded(size)


def _checksums(buckets: Iterable[Bucket]) -> dict[str, Checksum]:
    return {name: copy for bucket in buckets for name, copy in bucket.tensors.items()}


def _size(tensors: Mapping[str, Checksum]) -> int:
    return sum(_padded(shape.numel() * dtype.itemsize) for dtype, shape, *_ in tensors.values())


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
