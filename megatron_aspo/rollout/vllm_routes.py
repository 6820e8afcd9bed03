"""The experts that vLLM's routers choose for each token, returned with the responses (`train.router_replay=sampler`).

On a GPU vLLM itself adds them to finished outputs (`enable_return_routed_experts`). Its CPU build has no such option;
there a hook adds them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_aspo.errors import RunError
from megatron_aspo.rollout.vllm_start import model_of


class VllmRoutes:
    """The routes in the outputs of a `vllm.LLM` that was started with `start_vllm(routes=True)`.

    Args:
        has_rows: whether this is the first rank of its replica, the only one that gets routes.
    """

    def __init__(self, llm: Any, has_rows: bool) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        self.has_rows = has_rows
        self._engine: Any = llm.llm_engine
        experts: list[Any] = [module for module in model_of(llm).modules() if isinstance(module, MoERunner)]
        self._layers: list[int] = [module.layer_id for module in experts]
        if not torch.cuda.is_available():
            self._hook(experts)
            self._layers = list(range(len(experts)))
        elif not has_rows:
            # Workers of other ranks make no rows. Under an external launcher every rank has a scheduler of its own,
            # which ends the run when its worker's rows are missing.
            self._engine.engine_core.engine_core.scheduler.aux_output_connector = None

    def of(self, output: Any) -> npt.NDArray[np.uint8] | None:
        """Routes of a request's first response: [prompt + response - 1, layers with experts, top k]; None without
        `has_rows`. vLLM does not run the last token.

        Raises:
            RunError: vLLM returned another number of rows.
        """
        if not self.has_rows:
            return None
        rows, length = output.outputs[0].routed_experts, len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
        if rows is None or len(rows) != length - 1:
            found = "none" if rows is None else str(len(rows))
            raise RunError(f"vLLM returned the experts of {found} of a response's {length - 1} tokens before the last")
        return rows[:, self._layers].astype(np.uint8, copy=False)  # rows of dense layers have no meaning

    def _hook(self, experts: list[Any]) -> None:
        """Give each request's rows to vLLM's output processor, as its GPU worker would. Cached and chunked prompts
        would lack rows; `engine_arguments` turns both off on a CPU."""
        runner = self._engine.model_executor.driver_worker.worker.model_runner
        chosen: dict[int, Tensor] = {}
        for i, module in enumerate(experts):
            module.router.set_capture_fn(partial(chosen.__setitem__, i))
        execute, requests = runner.execute_model, self._engine.output_processor.request_states

        def execute_and_keep(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            result = execute(scheduled, *args, **kwargs)
            if scheduled.total_num_scheduled_tokens:
                rows = torch.stack([chosen[i] for i in range(len(experts))], 1).to(torch.uint8).numpy()
                at = 0
                for name in runner.input_batch.req_ids:
                    chunks, count = requests[name].routed_experts_chunks, scheduled.num_scheduled_tokens[name]
                    if runner.requests[name].num_computed_tokens == 0:
                        chunks.clear()  # a preempted request starts anew
                    chunks.append(rows[at : at + count])
                    at += count
            return result

        if self.has_rows:
            runner.execute_model = execute_and_keep
