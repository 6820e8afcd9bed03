"""Seconds spent in the parts of a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from megatron_aspo.errors import RunError
from megatron_aspo.ranks.gathering import post_phase


class Clock:
    """Adds up the seconds of named parts: `with clock("update"): ...`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a part; RunError if memory runs out in it."""
        post_phase(part)
        start = time.perf_counter()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if _is_out_of_memory(error):
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise RunError(
                    f"out of memory in {part}: {reason}; megatron-aspo plan shows the memory of each phase, "
                    "docs/operations.md the settings that reduce it"
                ) from error
            raise
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - start

    def __getitem__(self, part: str) -> float:
        return self._parts.get(part, 0.0)

    def seconds(self) -> dict[str, float]:
        """Return `time/<part>` of every part and `time/step`, the time since the clock was made."""
        parts = {f"time/{part}": seconds for part, seconds in self._parts.items()}
        return {**parts, "time/step": time.perf_counter() - self._start}


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Compare names: torch has an error class for GPUs only, and raises RuntimeError on CPUs."""
    by_name = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or by_name
