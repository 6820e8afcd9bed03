"""What holds for all tests: one thread, no launcher's environment, and the same random numbers on every run."""

import os
import sys

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors, and several processes to a core
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)

# `pytest --hypothesis-profile=default` looks for new examples.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,  # a machine may be busy
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_runtest_setup() -> None:
    """How many of torch's random numbers a process has drawn before a test is up to how the tests were shared out."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
