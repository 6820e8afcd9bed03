"""The policy's weights under Hugging Face's names, their transfer to a rollout engine in memory, and its checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.batch import Batch
from megatron_aspo.config.model import RMS_NORM_EPSILON, ModelConfig
from megatron_aspo.errors import RunError
from megatron_aspo.ranks.gathering import gather_objects

if TYPE_CHECKING:
    from megatron_aspo.policy.trainer import Policy

Weight = tuple[str, Tensor]
"""An unsharded tensor with its name in Hugging Face's checkpoints."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_PERIOD = 251
_SLICE = _PERIOD << 13
"""Elements of a tensor that a checksum reads at once."""


class WeightSyncError(RunError):
    """The engine's weights are not the policy's."""


class Checksum(NamedTuple):
    """The properties that two copies of a tensor share; without `refit_checksum` only type and shape."""

    dtype: torch.dtype
    shape: torch.Size
    sums: tuple[int, ...] = ()


class PolicyWeights:
    """Weights of the policy in this process."""

    sent_checksums: Mapping[str, Checksum] = {}

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def weight_version(self) -> int:
        """Optimizer updates that the weights have taken."""
        return self.policy.weight_version

    @property
    def stage(self) -> int:
        """This rank's stage of the pipeline."""
        return self.policy.stage

    def weights(self) -> Iterator[Weight]:
        """Yield every tensor whole on every rank; it may be a parameter's own memory. Collective."""
        from megatron_aspo.policy.hf import weights  # takes seconds to import

        yield from weights.export_whole(self._bridge(), self.policy.whole_chunks(), self.policy.vocab_size)

    def share(self) -> Iterator[Weight]:
        """Yield the tensors that this rank sends to rollout ranks, as `weights` does. Collective."""
        from megatron_aspo.policy.hf import weights

        yield from weights.export_share(self._bridge(), self.policy.whole_chunks(), self.policy.vocab_size)

    def _bridge(self) -> Any:
        from megatron_aspo.policy.hf import bridge

        model = self.policy.config.model
        if model.hf_path:
            return bridge.open_bridge(model.hf_path)
        from transformers import LlamaConfig

        return bridge.AutoBridge.from_hf_config(LlamaConfig(**llama_config(model, self.policy.vocab_size)))


def llama_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Hugging Face's `config.json` for a model that starts from random weights (no `model.hf_path`)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "max_position_embeddings": model.max_sequence_length,
        "rope_theta": model.rotary_base,
        "rms_norm_eps": RMS_NORM_EPSILON,
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": vocab_size,
    }


def transfer(
    weights: Iterable[Weight],
    load: Callable[[list[Weight]], None],
    bucket_bytes: int,
    with_checksums: bool,
    last: Mapping[str, Checksum],
) -> dict[str, Checksum]:
    """Pass all `weights` to `load`, a bucket at a time. Collective if the export is, and with checksums.

    A bucket is memory beside both models, and is dropped before the next one is filled.

    Args:
        last: what the last transfer returned; empty before the first.

    Returns:
        The tensors' checksums by name.

    Raises:
        WeightSyncError: a tensor is missing, new, or of another type or shape than in the last transfer; or ranks have
            different tensors, so their engines would sample from different policies.
    """
    checksums: dict[str, Checksum] = {}
    for bucket in buckets(weights, bucket_bytes):
        checksums |= {name: checksum(tensor, with_checksums) for name, tensor in bucket}
        load(bucket)
        del bucket
    check_layout(checksums, last)
    if with_checksums:
        for rank, gathered in enumerate(gather_objects(checksums)):
            check_copies(checksums, gathered, f"of rank {rank} and of rank {dist.get_rank()}")
    return checksums


def buckets(weights: Iterable[Weight], limit: int) -> Iterator[list[Weight]]:
    """Yield consecutive tensors of at most `limit` bytes together; a larger tensor is alone."""
    bucket: list[Weight] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def checksum(tensor: Tensor, with_sums: bool = True) -> Checksum:
    """Two sums modulo 2^64 over the values' bits, read as integers: one plain, one weighted by position modulo 251.

    Equal bits give equal sums on any device and with any number of threads, unlike a sum of floats. A contiguous tensor
    takes 24 bytes of working memory per element of a slice, 49 MB at most.
    """
    if not with_sums:
        return Checksum(tensor.dtype, tensor.shape)
    bits = tensor.detach().flatten().view(_INTEGERS[tensor.itemsize])
    # Weights repeat from slice to slice, because a slice is a multiple of their period.
    weights = torch.arange(min(len(bits), _SLICE), device=bits.device).remainder_(_PERIOD)
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for part in bits.split(_SLICE):
        integers = part.long()
        sums += torch.stack([integers.sum(), (integers * weights[: len(integers)]).sum()])
    plain, weighted = sums.tolist()
    return Checksum(tensor.dtype, tensor.shape, (plain, weighted))


def check_layout(sent: Mapping[str, Checksum], last: Mapping[str, Checksum]) -> None:
    """Raise WeightSyncError unless tensors have the names, types and shapes of the `last` ones, if there are any.

    vLLM detects a missing parameter, but not a missing part of a fused one, which would hold arbitrary values.
    """
    layout, known = ({(name, *copy[:2]) for name, copy in each.items()} for each in (sent, last or sent))
    if changed := sorted({name for name, *_ in layout ^ known}):
        raise WeightSyncError(
            f"{len(changed)} of {len(known)} tensors are missing, new, or of another type or shape than in the last "
            f"refit: {', '.join(changed[:3])}"
        )


def check_copies(sent: Mapping[str, Checksum], copies: Mapping[str, Checksum], where: str) -> None:
    """Raise WeightSyncError unless the checksums of all `copies` are those sent."""
    if different := sorted(name for name, copy in copies.items() if copy != sent.get(name)):
        first = ", ".join(different[:3])
        raise WeightSyncError(f"{len(different)} of {len(copies)} tensors {where} are not the same: {first}")


def check_weight_version(batch: Batch, oldest: int, newest: int) -> None:
    """Raise WeightSyncError unless the oldest weights that wrote a part of each response are of these versions."""
    versions = {batch.weight_version, *(sample.weight_version for group in batch.groups for sample in group)}
    if not oldest <= min(versions) <= max(versions) <= newest:
        written = ", ".join(map(str, sorted(versions)))
        due = f"{newest}" if oldest == newest else f"{oldest} to {newest}"
        raise WeightSyncError(
            f"weights of version {written} wrote a batch that is due from version {due}; the engine's refit "
            "must load the policy's weights, and its samples must have their weight_version"
        )
