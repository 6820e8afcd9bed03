from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip this folder before it is imported if it is deselected: importing Megatron takes ten seconds."""
    return True if "not distributed" in config.option.markexpr else None


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of three policies: reference, old and current."""
    from ranks import run, run_config, write_weights

    folder = tmp_path_factory.mktemp("weights")
    run(1, write_weights, folder, run_config().model)
    return folder
