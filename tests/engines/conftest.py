from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Spare runs that deselect this folder the imports."""
    return True if "not engines" in config.option.markexpr else None


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Hugging Face folder of every tiny model."""
    from tiny_models import MODELS, write_model

    folder = tmp_path_factory.mktemp("tiny")
    for name in MODELS:
        write_model(name, folder / name)
    return folder
