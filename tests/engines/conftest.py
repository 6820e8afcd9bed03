import os
from pathlib import Path

import pytest

ENGINES = (
    *("vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"),
    *("vllm.model_executor.models.llama", "megatron_aspo.policy.hf.weights"),
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip this folder before it is imported if it is deselected."""
    return True if "not engines" in config.option.markexpr else None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Import vLLM and the bridge in the process that forks ranks. Each rank then saves eight seconds of a core."""
    if any(Path(__file__).parent in item.path.parents for item in session.items):
        from ranks import preload

        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM reads it at import time
        preload(*ENGINES)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a Hugging Face folder of every tiny model."""
    from tiny_models import MODELS, write_model

    folder = tmp_path_factory.mktemp("tiny")
    for name in MODELS:
        write_model(name, folder / name)
    return folder
