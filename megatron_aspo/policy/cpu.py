"""Lets Megatron-Core run on a host without a GPU, over gloo; the only place that patches anything.

Megatron-Core takes CUDA for granted in several ways, and each has its answer here:

- factory calls with `device="cuda"`, and `Tensor.type()` compared with "torch.cuda.FloatTensor": a
  TorchFunctionMode rewrites both;
- functions of `torch.cuda` (streams, events, RNG state, synchronisation): replaced by ones that do what is
  right on one synchronous device;
- its own RNG tracker, which calls into CUDA's generators: mapped to the CPU generator;
- its checkpoint writer, which spawns a helper process a rank to hand results back (it imports torch again, takes
  0.5 GB, and stays when the rank is killed): a synchronous save needs a queue of this process only;
- its dispatcher of tokens to experts: it makes lists of split sizes while it fetches them from the GPU (made here where
  they lie), and gathers unequal parts from tensor-parallel ranks, which gloo cannot (all-reduced here);
- its small functions, decorated with torch.compile: imported without it;
- layers that exist for GPUs only, or are slow elsewhere: a norm that knows sequence parallelism, attention and
  rotary embedding over packed streams, with context parallelism;
- the experts of a rank, whose random weights would be those of every other rank.

Nothing happens when CUDA is available.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_aspo.packing import stream_part

_active: list[TorchFunctionMode] = []


def import_megatron() -> None:
    """Import Megatron-Core; if there is no CUDA, with its small functions uncompiled: torch.compile as their decorator
    imports torch's compiler, a third of all imports' time. What has been imported before is as it is."""
    if torch.cuda.is_available():
        import megatron.core  # noqa: F401

        return

    def uncompiled(model: Any = None, **options: Any) -> Any:
        return uncompiled if model is None else model

    compiled, torch.compile = torch.compile, uncompiled
    try:
        from megatron.core.jit import disable_jit_fuser
    finally:
        torch.compile = compiled
    disable_jit_fuser()  # for modules of Megatron that are imported from now on


def enable() -> bool:
    """Make Megatron-Core run on CPU if there is no CUDA. Idempotent; returns whether the CPU is used."""
    if torch.cuda.is_available():
        return False
    if not _active:
        _replace_cuda_functions()
        mode = _CudaMeansCpu()
        mode.__enter__()
        _active.append(mode)
    return True


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Tensors are what they are: for code that is not Megatron's and knows CPUs itself."""
    for mode in reversed(_active):
        mode.__exit__(None, None, None)
    try:
        yield
    finally:
        for mode in _active:
            mode.__enter__()


class _CudaMeansCpu(TorchFunctionMode):
    """Sends tensors meant for "cuda" to the CPU, and lets CPU tensors pass Megatron's tests of type names."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        elif func is torch.Tensor.to and any(_is_cuda(a) for a in args[1:]):
            args = (args[0], *("cpu" if _is_cuda(a) else a for a in args[1:]))
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + func(*args).removeprefix("torch.")
        return func(*args, **(kwargs or {}))


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _SynchronousStream:
    """Stands for a CUDA stream or event on a device where everything is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> _SynchronousStream:
        return self

    def query(self) -> bool:
        return True


def _replace_cuda_functions() -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as mcore_writer
    import megatron.core.models.common.embeddings.rope_utils as mcore_rope
    import megatron.core.tensor_parallel.mappings as mcore_mappings
    import megatron.core.tensor_parallel.random as mcore_random
    import megatron.core.transformer.moe.token_dispatcher as mcore_dispatcher

    def get_rng_state(*args: Any, **kwargs: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "current_stream": _SynchronousStream,
        "default_stream": _SynchronousStream,
        "Stream": _SynchronousStream,
        "Event": _SynchronousStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "manual_seed": torch.manual_seed,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    setattr(mcore_random, "_get_cuda_rng_state", get_rng_state)  # noqa: B010  (private names of another library)
    setattr(mcore_random, "_set_cuda_rng_state", set_rng_state)  # noqa: B010
    setattr(mcore_rope, "_apply_rotary_pos_emb_thd", _apply_rotary_thd)  # noqa: B010
    setattr(mcore_writer, "_results_queue", queue.Queue())  # noqa: B010
    mcore_dispatcher.maybe_move_tensor_to_cpu = _as_on_cpu
    for name, uneven in (("_gather_along_first_dim", _gather), ("_reduce_scatter_along_first_dim", _reduce_scatter)):
        setattr(mcore_mappings, name, partial(uneven, getattr(mcore_mappings, name)))


def _as_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _gather(even: Any, x: Tensor, group: Any, sizes: list[int] | None = None, *buffer: Any, **options: Any) -> Tensor:
    """Megatron's gather along the first dimension, with rank r's part of length sizes[r]."""
    if sizes is None or group.size() == 1:
        return even(x, group, sizes, *buffer, **options)
    whole = x.new_zeros(sum(sizes), *x.shape[1:])
    whole.split(sizes)[group.rank()].copy_(x)
    dist.all_reduce(whole, group=group)
    return whole


def _reduce_scatter(
    even: Any, x: Tensor, group: Any, sizes: list[int] | None = None, *buffer: Any, **options: Any
) -> Tensor:
    """Megatron's reduce-scatter along the first dimension, with rank r's part of length sizes[r]."""
    if sizes is None or group.size() == 1:
        return even(x, group, sizes, *buffer, **options)
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()]


def _apply_rotary_thd(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *, cp_group: Any, **options: Any) -> Tensor:
    """Rotary embedding of this rank's part [T / C, h, d] of a packed stream in one go; Megatron's own loops over the
    segments."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    positions = torch.arange(len(starts)) - starts
    if cp_group.size() > 1:
        positions = positions[stream_part(cu_seqlens, cp_group.rank(), cp_group.size())]
    return _apply_rotary_pos_emb_bshd(t[:, None], freqs[positions], **options)[:, 0]


def build_experts(builder: Any, num_local_experts: int, config: Any, *, pg_collection: Any, **options: Any) -> Any:
    """This rank's part of a layer's experts, drawn as if it held them all.

    Each rank draws its weights from the same generator on a CPU: if it drew its own alone, all ranks would hold
    the same experts, and all later weights would depend on the layout.
    """
    experts = builder(num_local_experts * pg_collection.ep.size(), config, pg_collection=pg_collection, **options)
    first = pg_collection.ep.rank() * num_local_experts
    experts.local_experts = experts.local_experts[first : first + num_local_experts]
    experts.num_local_experts = num_local_experts
    return experts


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm behind Megatron's constructor, and usable with sequence parallelism.

    Under sequence parallelism each rank sees its share of the positions only, so the weight's gradient must be
    summed over the tensor-parallel group; Megatron does that for parameters that carry the attribute.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010


class PackedAttention(torch.nn.Module):
    """Causal attention over packed streams (THD) and over batches (SBHD), in plain torch.

    A stream is unfolded to [segments, heads, longest segment, dim], so that work grows with the square of the
    segments' length and not of the stream's; no [T, T] mask exists. Under context parallelism every rank gathers the
    keys and values of the whole stream; batches are never parted.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        assert config.attention_dropout == 0, "PackedAttention has no dropout"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """[T, h, d] with `packed_seq_params`, else [s, b, h, d] -> [T, h d] or [s, b, h d]; under context
        parallelism T is this rank's part of the stream.

        In a batch the last query stands at the last key, as it does with a key-value cache.
        """
        assert attention_mask is None, "the mask is given by cu_seqlens, or causal"
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = _causal_attention(q, k, v, self.softmax_scale)
            return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
        if self.cp_group is not None:
            return self._parted(query, key, value, packed_seq_params)
        return self._packed(query, key, value, packed_seq_params)

    def _parted(self, query: Tensor, key: Tensor, value: Tensor, stream: Any) -> Tensor:
        """Whole keys and values, and queries that are zero where other ranks have theirs: exact, and as much work on
        every rank as the whole stream."""
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        assert self.cp_group is not None
        parts = [stream_part(stream.cu_seqlens_q, c, self.cp_group.size()) for c in range(self.cp_group.size())]
        mine, back_in_order = parts[self.cp_group.rank()], torch.cat(parts).argsort()
        # Its backward pass is a reduce-scatter: a key's gradient is the sum over the queries of all ranks.
        k, v = (gather_from_sequence_parallel_region(x, group=self.cp_group)[back_in_order] for x in (key, value))
        q = query.new_zeros(len(back_in_order), *query.shape[1:]).index_copy(0, mine, query)
        return self._packed(q, k, v, stream)[mine]

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, stream: Any) -> Tensor:
        unfold, fold = _segment_indices(stream.cu_seqlens_q, stream.max_seqlen_q)
        # Slots past a segment's end repeat its stream's first token: causality keeps them from being seen.
        q, k, v = (x[unfold].transpose(1, 2) for x in (query, key, value))
        out = _causal_attention(q, k, v, self.softmax_scale).transpose(1, 2)
        return out.reshape(-1, *out.shape[2:])[fold].flatten(1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)


def _segment_indices(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Gather indices stream -> [segments, max_seqlen], and flat ones back."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    offset = torch.arange(max_seqlen)
    inside = offset < lengths[:, None]
    return torch.where(inside, starts[:, None] + offset, 0), inside.flatten().nonzero()[:, 0]
