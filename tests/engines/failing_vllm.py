"""`python -m failing_vllm raise|kill STEP ARGUMENTS`: a rank of a training run in which rank 1 fails amid the responses
of a step: vLLM's forward pass raises, or the process is killed. The fault is in vLLM, below everything of ours."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from megatron_aspo import sampling, train

FAILURE = "DefaultCPUAllocator: can't allocate memory\n  in a frame of its own"


def main(how: str, step: int, arguments: list[str]) -> int:
    rollouts = 0
    sample_batch = sampling.sample_batch

    def counted(*args: Any) -> Any:
        nonlocal rollouts
        rollouts += 1
        if rollouts == step and os.environ["RANK"] == "1":
            fail_at_the_third_forward_pass(how)
        return sample_batch(*args)

    sampling.sample_batch = counted
    return train.main(arguments)


def fail_at_the_third_forward_pass(how: str) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    execute_model = CPUModelRunner.execute_model
    passes = 0

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if passes == 3:
            raise RuntimeError(FAILURE)
        return execute_model(self, *args, **kwargs)

    CPUModelRunner.execute_model = failing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
