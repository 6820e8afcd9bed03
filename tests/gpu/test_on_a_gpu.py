"""`pytest -m gpu`: all checks of `megatron-aspo gpu-check` on this machine's GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_aspo.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1000),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_all_checks_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-check", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
