"""Compare four implementations of the loss head: time relative to the GEMMs that all need, bytes, collectives.

    python benchmarks/loss_head.py                                  # the table of docs/performance.md
    python benchmarks/loss_head.py --tp 2 --tokens 1024 --hidden 1024 --vocab 32768 --repeats 3

A case is (tokens T, hidden size H, vocabulary V, tensor-parallel ranks tp). Every rank is a process with one thread.
All implementations get the same hidden states [T, H] and weight [V/tp, H] in bfloat16 and compute the loss and both
gradients; the weight's gradient is added to a float32 buffer, like Megatron's `main_grad`. They run in turn, so that
other load affects all of them. The reported time is the median, over turns, of the ratio to the floor of the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from counting import Count
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from megatron_aspo.loss import PolicyLossConfig, fused_linear_policy_loss, policy_loss, vocab_parallel_logprobs
from megatron_aspo.loss.fused_gradients import add_product
from megatron_aspo.loss.fused_linear import CHUNK_SIZE

CASES = [  # T, H, V, tp
    (2048, 2048, 38016, 1),
    (1024, 2048, 76032, 2),
    (2048, 2048, 76032, 2),
    (4096, 2048, 76032, 2),
    (2048, 1024, 76032, 2),
    (2048, 2048, 152064, 2),
]
CHUNK = CHUNK_SIZE
FLOOR = "floor: the three GEMMs"


class Head:
    """Inputs of one rank, and each implementation of loss and gradients as a method."""

    def __init__(self, tokens: int, hidden: int, vocab: int, group: dist.ProcessGroup) -> None:
        generator = torch.Generator().manual_seed(0)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.group = group
        self.hidden = torch.randn(tokens, hidden, generator=generator).bfloat16().requires_grad_()
        self.targets = torch.randint(0, vocab, (tokens,), generator=generator)
        self.old_logprobs = -10 + torch.randn(tokens, generator=generator)
        self.advantages = torch.randn(tokens, generator=generator)
        self.mask = torch.ones(tokens, dtype=torch.bool)
        generator.manual_seed(1 + rank)
        weight = torch.randn(vocab // ranks, hidden, generator=generator) * hidden**-0.5
        self.weight: Any = torch.nn.Parameter(weight.bfloat16())
        self.weight.main_grad = torch.zeros(weight.shape)
        self.weight.grad_added_to_main_grad = False
        self.config = PolicyLossConfig()

    def floor(self) -> None:
        """Run the three GEMMs of every chunk and the all-reduce of the hidden states' gradient."""
        grad_hidden = torch.empty_like(self.hidden)
        logits = torch.empty(CHUNK, self.weight.shape[0], dtype=torch.bfloat16)
        with torch.no_grad():
            for start in range(0, self.hidden.shape[0], CHUNK):
                states = self.hidden[start : start + CHUNK]
                torch.mm(states, self.weight.t(), out=logits)
                torch.mm(logits, self.weight, out=grad_hidden[start : start + CHUNK])
                add_product(self.weight.main_grad, logits.t(), states)
            if dist.get_world_size(self.group) > 1:
                dist.all_reduce(grad_hidden, group=self.group)

    def fused(self) -> None:
        out = fused_linear_policy_loss(
            self.hidden,
            self.weight,
            self.targets,
            self.old_logprobs,
            self.advantages,
            self.mask,
            self.config,
            self.group,
            chunk_size=CHUNK,
        )
        out.loss_sum.backward()
        self.weight.grad = None  # a placeholder: the gradient is in main_grad

    def logits_path(self) -> None:
        logprobs, entropy = vocab_parallel_logprobs(self._logits(), self.targets, self.group)
        self._policy_loss(logprobs, entropy).backward()
        self._to_main_grad()

    def megatron_cross_entropy(self) -> None:
        """Run Megatron-Core's cross entropy, which overwrites float32 logits and has no entropy."""
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        logits = self._logits()[:, None].float()
        logprobs = -vocab_parallel_cross_entropy(logits, self.targets[:, None], tp_group=self.group)[:, 0]
        del logits
        self._policy_loss(logprobs, None).backward()
        self._to_main_grad()

    def gather_then_log_softmax(self) -> None:
        log_p = torch.log_softmax(_GatherVocabulary.apply(self._logits(), self.group).float(), -1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        logprobs = log_p.gather(1, self.targets[:, None])[:, 0]
        del log_p
        self._policy_loss(logprobs, entropy).backward()
        self._to_main_grad()

    def _logits(self) -> Tensor:
        return _ColumnParallel.apply(self.hidden, self.weight, self.group)

    def _policy_loss(self, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
        out = policy_loss(logprobs, self.old_logprobs, self.advantages, self.mask, self.config, entropy=entropy)
        return out.loss_sum

    def _to_main_grad(self) -> None:
        self.weight.main_grad.add_(self.weight.grad)
        self.weight.grad = None


class _ColumnParallel(torch.autograd.Function):
    """hidden @ weight.T; backward all-reduces the gradient of the hidden states, as Megatron's output layer does."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.group = group
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        grad_hidden = grad @ weight
        if dist.get_world_size(ctx.group) > 1:
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden, grad.t() @ hidden, None


class _GatherVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        ranks, ctx.rank = dist.get_world_size(group), dist.get_rank(group)
        ctx.columns = logits.shape[1]
        gathered = logits.new_empty(ranks * logits.shape[0], logits.shape[1])
        dist.all_gather_single(gathered, logits, group=group)
        return torch.cat(gathered.chunk(ranks), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[:, ctx.rank * ctx.columns : (ctx.rank + 1) * ctx.columns].contiguous(), None


WAYS: dict[str, Callable[[Head], None]] = {
    FLOOR: Head.floor,
    "fused sweep": Head.fused,
    "logits path": Head.logits_path,
    "Megatron-Core's cross entropy": Head.megatron_cross_entropy,
    "gather, then log_softmax": Head.gather_then_log_softmax,
}


def measure(rank: int, case: Sequence[int], port: int, repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    tokens, hidden, vocab, ranks = case
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    head = Head(tokens, hidden, vocab, group)
    results: dict[str, Any] = {}
    for name, way in WAYS.items():
        with Count() as count:
            way(head)
            head.hidden.grad = None
        results[name] = {"peak_bytes": count.peak, "collectives": _summary(count.collectives)}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, way in WAYS.items():
            dist.barrier()
            start = time.perf_counter()
            way(head)
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
            head.hidden.grad = None
    for name in WAYS:
        ratios = [s / floor for s, floor in zip(seconds[name], seconds[FLOOR], strict=True)]
        results[name] |= {"ratio": statistics.median(ratios), "seconds": statistics.median(seconds[name])}
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _summary(collectives: list[tuple[str, int]]) -> dict[str, list[int]]:
    """Return [calls, bytes] by name."""
    found: dict[str, list[int]] = {}
    for name, size in collectives:
        calls, total = found.get(name, (0, 0))
        found[name] = [calls + 1, total + size]
    return found


def run_case(case: Sequence[int], repeats: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, args=(case, port, repeats, folder), nprocs=case[3])
        return json.loads(Path(folder, "result.json").read_text())


def show(case: Sequence[int], results: dict[str, Any], console: Console) -> None:
    tokens, hidden, vocab, ranks = case
    table = Table(
        title=f"T={tokens:,} H={hidden:,} V={vocab:,} tp={ranks}, bfloat16, chunks of {CHUNK}",
        caption=f"a chunk of logits in float32: {4 * CHUNK * vocab // ranks / 1e6:.0f} MB",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for column in ("time / floor", "seconds", "peak MB over inputs"):
        table.add_column(column, justify="right")
    table.add_column("collectives: calls, bytes sent by a rank")
    for name, r in results.items():
        calls = "; ".join(f"{k} {n}, {b:,}" for k, (n, b) in r["collectives"].items()) or "none"
        table.add_row(name, f"{r['ratio']:.2f}", f"{r['seconds']:.2f}", f"{r['peak_bytes'] / 1e6:,.0f}", calls)
    console.print(table)


def cases(options: argparse.Namespace) -> Iterator[Sequence[int]]:
    if options.tokens is None:
        yield from (case for case in CASES if options.tp in (None, case[3]))
    else:
        yield options.tokens, options.hidden, options.vocab, options.tp or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="one case of this T instead of the table's")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=76032)
    parser.add_argument("--tp", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.tokens is not None and options.vocab % (options.tp or 1):
        parser.error(f"--vocab {options.vocab} is not a multiple of --tp {options.tp}")
    console = Console(width=150)
    found: list[dict[str, Any]] = []
    for case in track(list(cases(options)), "cases", console=Console(stderr=True)):
        results = run_case(case, options.repeats)
        show(case, results, console)
        found.append({"case": list(case), "ways": results})
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
