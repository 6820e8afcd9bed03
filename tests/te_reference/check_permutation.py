"""Compare `permutation` with the Triton kernels that it replaces, in Triton's interpreter; exit code 1 if they differ.

usage: TRITON_INTERPRET=1 python -m te_reference.check_permutation FOLDER_OF_TRANSFORMER_ENGINE

The variable must be set before Triton is imported, so this is a program. It loads two files of Transformer Engine,
without its packages.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import torch

from te_reference import permutation

TOKENS, EXPERTS, WIDTH = 21, 6, 70


class Blocked:
    """A kernel with a fixed block size in place of a tuned one, which needs a GPU."""

    def __init__(self, tuned: Any) -> None:
        self.kernel = tuned.fn

    def __getitem__(self, grid: Any) -> Any:
        size = {"BLOCK_SIZE": 64}
        kernel = self.kernel[grid(size) if callable(grid) else grid]
        return lambda *args, **kwargs: kernel(*args, **kwargs, **size)


def load_kernels(folder: Path) -> Any:
    """The module with the kernels' callers, which allocates on the CPU."""
    for name in ("transformer_engine", "transformer_engine.common", "transformer_engine.common.triton"):
        sys.modules[name] = types.ModuleType(name)
    for name, file in (
        ("transformer_engine.common.triton.permutation", "common/triton/permutation.py"),
        ("callers", "pytorch/triton/permutation.py"),
    ):
        spec = importlib.util.spec_from_file_location(name, folder / file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    callers: Any = sys.modules["callers"]
    for name in ("_permute_kernel", "_unpermute_kernel", "_sort_chunks_by_map_kernel"):
        setattr(callers, name, Blocked(getattr(callers, name)))

    def zeros(*size: Any, device: str, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **options)

    callers.torch = types.SimpleNamespace(Tensor=torch.Tensor, int32=torch.int32, empty=zeros, zeros=zeros)
    return callers


def check_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # None equals None


def check_routes(kernels: Any, padded: bool, dtype: torch.dtype) -> None:
    routing = torch.rand(TOKENS, EXPERTS) < 0.5
    probs = torch.rand(TOKENS, EXPERTS) * routing
    counts = routing.sum(0)
    target = (counts + 3) // 4 * 4 if padded else counts
    offsets = (target - counts).cumsum(0) - (target - counts) if padded else None
    total = int(target.sum())
    ids, expected = (m.make_row_id_map(routing, TOKENS, EXPERTS) for m in (kernels, permutation))
    used = torch.arange(EXPERTS) < expected[:, -1:]
    assert torch.equal(ids[:, -1], expected[:, -1])
    for a, b in zip(ids[:, :-1].split(EXPERTS, 1), expected[:, :-1].split(EXPERTS, 1), strict=True):
        assert torch.equal(a[used], b[used])  # the rest is uninitialised
    sizes = (None, offsets, TOKENS, EXPERTS, total, WIDTH, None)
    x = torch.randn(TOKENS, WIDTH).to(dtype)
    rows = [m.permute_with_mask_map(x, ids, probs, *sizes) for m in (kernels, permutation)]
    check_same(*rows)
    # In float32: the interpreter cuts off what does not fit into bfloat16, where a GPU rounds.
    values = torch.randn(total, WIDTH)
    back = (None, rows[0][2], offsets, TOKENS, EXPERTS, WIDTH)
    check_same(*(m.unpermute_with_mask_map(values, ids, *back) for m in (kernels, permutation)))


def check_chunks(kernels: Any) -> None:
    sizes, order = torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0, 3, 1])
    x, probs = torch.randn(8, WIDTH), torch.randn(8)
    maps = [m.make_chunk_sort_map(sizes, order, 8, 4) for m in (kernels, permutation)]
    check_same(maps[:1], maps[1:])
    for forward in (True, False):
        check_same(*(m.sort_chunks_by_map(x, maps[0], probs, 8, WIDTH, forward) for m in (kernels, permutation)))


def main() -> None:
    torch.manual_seed(0)
    kernels = load_kernels(Path(sys.argv[1]))
    for padded, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        check_routes(kernels, padded, dtype)
    check_chunks(kernels)


if __name__ == "__main__":
    main()
