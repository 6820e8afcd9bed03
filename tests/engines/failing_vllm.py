"""`python -m failing_vllm ARGUMENTS`: a rank of a training run in which vLLM's third forward pass raises on rank 1."""

import os
import sys
from typing import Any

from megatron_aspo.commands import train
from megatron_aspo.rollout import vllm

start_vllm = vllm.start_vllm
passes = 0


def start_to_fail(*arguments: Any) -> Any:
    llm = start_vllm(*arguments)
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    execute_model = CPUModelRunner.execute_model

    def failing(*arguments: Any, **named: Any) -> Any:
        global passes
        passes += 1
        if passes == 3 and os.environ["RANK"] == "1":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\n  in a frame of its own")
        return execute_model(*arguments, **named)

    CPUModelRunner.execute_model = failing
    return llm


if __name__ == "__main__":
    vllm.start_vllm = start_to_fail
    sys.exit(train.main(sys.argv[1:]))
