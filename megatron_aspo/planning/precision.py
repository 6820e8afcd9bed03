"""What number formats ask of lengths and bytes; the one place for it. Plain arithmetic; imports no torch."""

from __future__ import annotations

from megatron_aspo.config import ParallelConfig
from megatron_aspo.errors import UserError

FP8_MULTIPLES = {"blockwise": 128, "mxfp8": 32, "delayed": 16, "tensorwise": 16, "current": 16}
"""FP8 recipe -> what the tokens of a matrix multiplication must be a multiple of. Megatron-Core does not pad packed
streams to it."""


def check_packed_length(max_tokens: int, parallel: ParallelConfig, recipe: str | None) -> None:
    """Raise UserError unless streams of `max_tokens` can be parted over ranks as an FP8 recipe needs."""
    multiple = FP8_MULTIPLES[recipe] if recipe else 1
    parts = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    whole = multiple * parts * (2 if parallel.context > 1 else 1)
    if max_tokens % whole:
        raise UserError(
            f"train.max_tokens_per_micro_batch={max_tokens} is not a multiple of {whole}, which {recipe} FP8 needs for "
            f"streams parted over {parts} ranks; make it {max(1, round(max_tokens / whole)) * whole}"
        )


def optimizer_bytes(dtype: str, moments: str) -> int:
    """Of a parameter's float32 master copy (none where the model is float32) and Adam's two moments."""
    return (4 if dtype == "bfloat16" else 0) + 2 * (4 if moments == "float32" else 2)
