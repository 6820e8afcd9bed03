"""What holds for all tests: one thread, no launcher's environment, and the same random examples on every run."""

import os

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
