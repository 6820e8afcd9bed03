from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Spare runs that deselect this folder ten seconds of importing Megatron."""
    return True if "not distributed" in config.option.markexpr else None
