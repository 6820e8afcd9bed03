"""Memory and collectives of `vocab_parallel_logprobs`, counted exactly: `python benchmarks/logprobs_memory.py`.

Every storage that an operator makes is counted while it lives, so the figures do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import weakref
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_aspo.loss import vocab_parallel_logprobs


class PeakBytes(TorchDispatchMode):
    """Bytes of the storages made under the mode and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen and storage._cdata not in inputs:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def measure(rank: int, world_size: int, port: int, tokens: int, vocab: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(rank)
    logits = torch.randn(tokens, vocab // world_size, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(0))

    calls: list[int] = []
    gather = dist.all_gather_single
    dist.all_gather_single = lambda out, own, group=None: (calls.append(own.nbytes), gather(out, own, group=group))[1]
    with PeakBytes() as memory:
        logprobs, entropy = vocab_parallel_logprobs(logits, targets, dist.group.WORLD)
        assert entropy is not None
        forward_peak, forward_calls = memory.peak, len(calls)
        (logprobs.sum() + 0 * entropy.sum()).backward()
    if rank == 0:
        report = {
            "tokens": tokens,
            "vocabulary": vocab,
            "tensor_parallel": world_size,
            "dtype": "bfloat16",
            "peak_bytes_per_local_logit_forward": round(forward_peak / logits.numel(), 3),
            "peak_bytes_per_local_logit_forward_and_backward": round(memory.peak / logits.numel(), 3),
            "of_which_the_gradient_itself": logits.element_size(),
            "collectives_forward": forward_calls,
            "collectives_backward": len(calls) - forward_calls,
            "bytes_sent_per_rank": sum(calls),
        }
        print(json.dumps(report, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--tp", type=int, default=2)
    options = parser.parse_args()
    mp.spawn(measure, args=(options.tp, 29517, options.tokens, options.vocab), nprocs=options.tp)
