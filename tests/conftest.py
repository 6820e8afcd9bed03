"""Setup shared by all tests: one thread, no launcher variables in the environment, and fixed random seeds."""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny tensors, several processes a core
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)

# `pytest --hypothesis-profile=default` looks for new examples.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,  # the machine may be busy
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_runtest_setup() -> None:
    """Reseed torch before every test. Otherwise its random numbers would depend on which tests the process ran
    before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failed test's name, seconds and error as soon as it ends: a run that is cut off has no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        error = "\n".join(report.longreprtext.splitlines()[-30:])
        print(f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.0f} s)\n{error}", flush=True)


@pytest.fixture(autouse=True)
def same_switches() -> Iterator[None]:
    """A test that leaves a switch set changes the tests that its process runs next: one failed for TRITON_INTERPRET."""
    before = _switches()
    yield
    assert _switches() == before, "the test or what it calls changed os.environ for the tests after it"


def _switches() -> dict[str, str]:
    """Variables that choose code. Loading a checkpoint, rehearsals and imported libraries set others for good."""
    prefixes = ("TRITON_", "TORCH_COMPILE_", "CUDA_VISIBLE_", "MEGATRON_ASPO_LAYERS", "MEGATRON_ASPO_TE")
    by_import = {"TRITON_CACHE_AUTOTUNING"}  # of vLLM
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes) and name not in by_import}
