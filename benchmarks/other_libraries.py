"""Memory of other libraries' vocab-parallel log-probs and entropy, beside this one's, on a CPU over gloo.

    python benchmarks/other_libraries.py --slime CHECKOUT --nemo-rl CHECKOUT [--tp 2] [--tokens 512] [--vocab 8192]

A checkout is a clone of THUDM/slime or NVIDIA-NeMo/RL, of which single files are imported. verl takes part if it is
installed (`.venv-integrations/bin/python`). All get the same bf16 logits [T, V/tp] and give log-probs, with or without
entropy; the loss is a weighted sum. Printed: live bytes per local logit beyond the logits, after the forward pass and
at the peak of both passes, where the gradient and its copy for the model take 4; and the largest difference of a
gradient from the first library's. NeMo-RL's chunks have a quarter of the tokens.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from counting import Count
from torch import Tensor

from megatron_aspo.loss import vocab_parallel_logprobs

Head = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
"""(logits, whether entropy is wanted) -> log-probs and entropy, None if the library has none."""


def import_file(name: str, path: Path) -> Any:
    """Import a file under a full name, with empty packages above it."""
    parents = name.split(".")[:-1]
    for n in range(1, len(parents) + 1):
        sys.modules.setdefault(".".join(parents[:n]), types.ModuleType(".".join(parents[:n])))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def heads(targets: Tensor, vocab: int, args: argparse.Namespace) -> Iterator[tuple[str, Head]]:
    """Yield each library that is there, by name."""
    import megatron.core.parallel_state as mpu
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group: Any = mpu.get_tensor_model_parallel_group()
    tokens = len(targets)
    first = dist.get_rank(group) * vocab // group.size()
    end = first + vocab // group.size()

    def here(logits: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        logprobs, of_all = vocab_parallel_logprobs(logits, targets, group)
        return logprobs, of_all if entropy else None

    yield "megatron_aspo", here
    yield (
        "Megatron-Core",
        lambda x, _: (-fused_vocab_parallel_cross_entropy(x[:, None], targets[:, None], group)[:, 0], None),
    )
    if args.slime:
        slime = import_file("slime.utils.ppo_utils", args.slime / "slime" / "utils" / "ppo_utils.py")

        def of_slime(logits: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
            logprobs, of_all = slime.calculate_log_probs_and_entropy(logits, targets, group, with_entropy=entropy)
            return logprobs.flatten(), of_all

        yield "slime", of_slime
    if args.nemo_rl:
        for name in ("algorithms.logits_sampling_utils", "distributed.model_utils"):
            nemo = import_file(f"nemo_rl.{name}", args.nemo_rl / "nemo_rl" / f"{name.replace('.', '/')}.py")

        def of_nemo(logits: Tensor, entropy: bool, chunk: int | None) -> tuple[Tensor, Tensor | None]:
            place = (targets[None], first, end)
            if chunk is None:
                logprobs = nemo.DistributedLogprob.apply(logits[None], *place, group, False)
            else:
                logprobs = nemo.ChunkedDistributedLogprob.apply(logits[None], *place, chunk, group, False)
            if not entropy:
                return logprobs[0], None
            negative = nemo.ChunkedDistributedEntropy.apply(logits[None], chunk or tokens, group, False)
            return logprobs[0], -negative[0]

        yield "NeMo-RL", lambda x, e: of_nemo(x, e, None)
        yield "NeMo-RL, chunks", lambda x, e: of_nemo(x, e, tokens // 4)
    if importlib.util.find_spec("verl"):
        verl = importlib.import_module("verl.utils.megatron.tensor_parallel")

        def of_verl(logits: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
            # The log-probs overwrite the logits, which entropy needs.
            logprobs = verl.vocab_parallel_log_probs_from_logits(logits.clone() if entropy else logits, targets)
            return logprobs, verl.vocab_parallel_entropy(logits) if entropy else None

        yield "verl", of_verl


def measure(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.tp)
    import megatron.core.parallel_state as mpu

    mpu.initialize_model_parallel(args.tp)
    torch.manual_seed(0)
    local = args.vocab // args.tp
    published = torch.randn(args.tokens, args.vocab).mul(2).bfloat16()[:, rank * local : (rank + 1) * local]
    targets = torch.randint(0, args.vocab, (args.tokens,))
    of_logprobs, of_entropy = torch.rand(2, args.tokens)
    first: dict[bool, Tensor] = {}
    for name, head in heads(targets, args.vocab, args):
        for entropy in (False, True):
            leaf = published.clone().requires_grad_()
            logits = leaf * 1  # a model's output, not a leaf
            with Count() as count:
                logprobs, of_all = head(logits, entropy)
                forward = count.peak
                loss = (logprobs.float() * of_logprobs).sum()
                if of_all is not None:
                    loss = loss + (of_all * of_entropy).sum()
                loss.backward()
            if entropy and of_all is None:
                continue
            assert leaf.grad is not None
            gradient = leaf.grad.float()
            difference = (gradient - first.setdefault(entropy, gradient)).abs().max().item()
            if rank == 0:
                kept, peak = (value / (args.tokens * local) for value in (forward, count.peak))
                what = "log-probs, entropy" if entropy else "log-probs"
                print(f"{name:16} {what:20} {kept:6.2f} {peak:6.2f}  {difference:.1e}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slime", type=Path, help="a clone of THUDM/slime")
    parser.add_argument("--nemo-rl", type=Path, help="a clone of NVIDIA-NeMo/RL")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(measure, (args, port), args.tp)


if __name__ == "__main__":
    main()
