"""What holds for all tests: one thread, and no launcher's environment."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors, and several processes to a core
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)
