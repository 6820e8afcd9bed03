"""examples/integrations/megatron_lm under Megatron-Core's own schedules, with its own GPTModel and layers."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from ranks import VOCAB, ends, full_tensors, run, run_config
from torch import Tensor
from torch.distributed.run import get_args_parser
from watch import Watch

from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.loss import PolicyLossConfig, policy_loss
from megatron_aspo.loss.objectives import LOG_RATIO_LIMIT, find_objective
from megatron_aspo.policy.layer_specs import block_spec
from megatron_aspo.policy.parallel import initialize_parallel
from megatron_aspo.ranks.process_group import distributed

pytestmark = pytest.mark.distributed

ADAPTER = Path(__file__).parents[2] / "examples/integrations/megatron_lm/megatron_lm_aspo.py"
README = ADAPTER.with_name("README.md").read_text(encoding="utf-8")
BATCH, SEQUENCE, MICRO_BATCHES = 3, 10, 3
LOGITS = BATCH * SEQUENCE * VOCAB * 4
"""Bytes of a micro-batch's logits in float32."""
ARGS = SimpleNamespace(
    grpo_clamp_eps_lower=0.1,
    grpo_clamp_eps_upper=0.3,
    grpo_kl_beta=0.1,
    grpo_entropy_term_weight=0.02,
    rl_inference_logprobs_is_correction=True,
    rl_importance_sampling_truncation_coef=1.5,
)
LOSS = PolicyLossConfig(
    clip_low=0.1,
    clip_high=0.3,
    kl_coef=0.1,
    entropy_coef=0.02,
    rollout_correction="truncate",
    rollout_ratio_low=0.0,
    rollout_ratio_high=1.5,
)
"""Expected loss configuration for `ARGS`."""
LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tensor=2),
    ParallelConfig(pipeline=2),
    ParallelConfig(tensor=2, pipeline=2),
]
STARTS = [i * SEQUENCE for i in range(BATCH)]
_ends = torch.tensor([*STARTS, BATCH * SEQUENCE], dtype=torch.int32)
PACKED = PackedSeqParams(
    qkv_format="thd", cu_seqlens_q=_ends, cu_seqlens_kv=_ends, max_seqlen_q=SEQUENCE, max_seqlen_kv=SEQUENCE
)


def adapter() -> Any:
    sys.path.insert(0, str(ADAPTER.parent))
    return importlib.import_module("megatron_lm_aspo")


def existing_model(parallel: ParallelConfig, packed: bool = False) -> DistributedDataParallel:
    """A plain GPTModel whose weights do not depend on the layout. Megatron's layers support packed sequences on GPUs
    only, so the CPU shim's layers replace them."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        normalization="RMSNorm",
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(
        config,
        block_spec(config) if packed else get_gpt_layer_local_spec(normalization="RMSNorm"),  # type: ignore[arg-type]
        VOCAB,
        SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    set_weights(model)
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)


def set_weights(model: GPTModel) -> GPTModel:
    for tensor in nested_values(model.sharded_state_dict()):
        if isinstance(tensor, ShardedTensor) and tensor.data is not None:
            whole = torch.randn(tensor.global_shape, generator=generator(tensor.key))
            centre = 1.0 if "norm" in tensor.key and tensor.key.endswith("weight") else 0.0
            with torch.no_grad():
                tensor.data.copy_(centre + 0.3 * whole[tensor.global_slice()])
    return model


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def variables(i: int) -> dict[str, Tensor]:
    """Variables of `train_rl.py` just before its log-probs are computed; some ratios are clipped."""
    draw = generator(f"micro-batch {i}")

    def logprobs() -> Tensor:
        return torch.randn(BATCH, SEQUENCE - 1, generator=draw) - 5

    mask = torch.rand(BATCH, SEQUENCE - 1, generator=draw) < 0.6
    mask[0] &= i != 1
    return {
        "tokens": torch.randint(VOCAB, (BATCH, SEQUENCE), generator=draw),
        "advantages": torch.randn(BATCH, generator=draw),
        "old_logprobs": logprobs(),
        "loss_mask": mask.float(),
        "ref_logprobs": logprobs(),
        "inference_logprobs": logprobs(),
    }


def positions() -> Tensor:
    return torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)


def by_hand() -> tuple[dict[str, float], dict[str, Tensor]]:
    """Expected metrics and gradients of the mean over all tokens: full logits, float64 softmax, no schedule."""
    config = run_config()
    with distributed(config):
        initialize_parallel(config.parallel, 0)
        model = existing_model(config.parallel)
        sums, metrics = [], {}
        for i in range(MICRO_BATCHES):
            given = variables(i)
            logits = model(given["tokens"], positions(), None)[:, :-1].double()
            table = logits.log_softmax(-1)
            out = policy_loss(
                table.gather(-1, given["tokens"][:, 1:, None])[..., 0],
                given["old_logprobs"].double(),
                given["advantages"].double()[:, None].expand(BATCH, SEQUENCE - 1),
                given["loss_mask"],
                LOSS,
                entropy=-(table.exp() * table).sum(-1),
                ref_logprobs=given["ref_logprobs"].double(),
                rollout_logprobs=given["inference_logprobs"].double(),
            )
            sums.append((out.loss_sum, out.denominator))
            for name, pair in out.metrics.items():
                metrics[name] = metrics.get(name, 0) + torch.stack(pair).double()
        loss_sum, denominator = (torch.stack(column).sum() for column in zip(*sums, strict=True))
        (loss_sum / denominator).backward()
        gradients = whole_gradients(model)
    return {f"aspo/{name}": float(pair[0] / pair[1]) for name, pair in metrics.items()}, gradients


def whole_gradients(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad)
    holder: Any = SimpleNamespace(model=model)
    return {name: value.clone() for name, value in full_tensors(holder).items()}


def by_schedule(parallel: ParallelConfig, fused: bool, packed: bool) -> tuple[dict[str, float], dict[str, Tensor], int]:
    """Metrics and gradients from Megatron's schedule, and the largest gather input of this rank in bytes."""
    config = run_config(parallel)
    with distributed(config):
        initialize_parallel(parallel, 0)
        model, aspo = existing_model(parallel, packed), adapter()
        model.zero_grad_buffer()
        data: list[Any] = [variables(i) for i in range(MICRO_BATCHES)]

        def train_rl_step(data: Any, model: Any) -> Any:
            given = next(data)
            if not packed:
                return aspo.aspo_step(model, given["tokens"], positions(), aspo.rl_batch(**given), LOSS, None, fused)
            return in_train_rl(aspo, model, one_bin(given))

        with Watch() as watch:
            reported = get_forward_backward_func()(
                forward_step_func=train_rl_step,
                data_iterator=iter(data),
                model=[model],
                num_microbatches=MICRO_BATCHES,
                seq_length=SEQUENCE * (BATCH if packed else 1),
                micro_batch_size=1 if packed else BATCH,
                forward_only=False,
            )
        averages: dict[str, float] = {}
        for name in reported[0] if reported else ():
            total, count = torch.stack([one[name] for one in reported]).sum(0)
            averages[name] = float(total / count)
        gathered = [size for name, size in watch.collectives if "gather" in name]
        return averages, whole_gradients(model), max(gathered, default=0)


def in_train_rl(aspo: Any, model: Any, given: dict[str, Tensor]) -> Any:
    """Run the page's lines with the variables of `train_rl.py`."""
    variables_there = {
        **given,
        "model_to_use": model,
        "position_ids": positions().reshape(1, -1),
        "seq_starts": STARTS,
        "seq_lengths": [SEQUENCE] * BATCH,
        "packed_seq_params": PACKED,
        "args": ARGS,
    }
    (lines,) = (block for block in blocks("python") if "rl_batch(" in block)
    names: dict[str, Any] = {name: getattr(aspo, name) for name in ("aspo_step", "rl_batch", "rl_config")}
    body = "".join(f"    {line}\n" for line in lines.splitlines())
    exec(f"def step({', '.join(variables_there)}):\n{body}", names)
    step: Any = names["step"]
    return step(**variables_there)


def blocks(language: str) -> list[str]:
    """Code blocks of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def one_bin(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sequences concatenated, as `--rl-use-sequence-packing` does."""
    shifted = {
        name: torch.nn.functional.pad(value, (0, 1), value=torch.nan if "logprobs" in name else 0)
        for name, value in given.items()
        if name not in ("tokens", "advantages")
    }
    rows = {name: value.reshape(1, -1)[:, :-1] for name, value in shifted.items()}
    return {**rows, "tokens": given["tokens"].reshape(1, -1), "advantages": given["advantages"]}


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, float], dict[str, Tensor]]:
    return run(1, by_hand)[0]


@pytest.mark.parametrize(
    ("parallel", "fused", "packed"),
    [
        *((parallel, fused, False) for parallel in LAYOUTS for fused in (True, False)),
        (ParallelConfig(tensor=2, sequence_parallel=True), True, True),
        (ParallelConfig(pipeline=2), True, True),
    ],
)
def test_megatrons_schedules_make_the_mean_over_all_tokens(
    parallel: ParallelConfig, fused: bool, packed: bool, expected: Any
) -> None:
    results = run(parallel.tensor * parallel.pipeline, by_schedule, parallel, fused, packed)
    metrics, gradients = expected
    for averages, _, _ in results[-parallel.tensor :]:  # ranks of the last stage
        assert averages == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    for _, found, _ in results:
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = float((found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6))
            assert error < 2e-5, f"{name} is off by {error:.1e} of its largest gradient"
    if parallel.tensor > 1 and not packed:  # a rank gathers statistics or hidden states, never logits
        assert 0 < max(gathered for _, _, gathered in results) < LOGITS // parallel.tensor


def test_a_metric_over_no_token_reads_0() -> None:
    """Megatron-LM divides the pairs, and treats NaN as a failed iteration."""
    none = torch.zeros(1, 4)
    _, _, metrics = adapter().loss_func(policy_loss(none, none, none, none, LOSS, none, none, none))
    assert metrics["aspo/ratio_pos"].shape == (2,)
    assert all(float(total / count) == 0 for total, count in metrics.values())


def test_the_batch_reaches_the_clips(expected: Any) -> None:
    metrics, gradients = expected
    for sign in ("pos", "neg"):
        assert 0.05 < metrics[f"aspo/clip_fraction_{sign}"] < 0.95
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in gradients.values())


def mean_per_micro_batch() -> None:
    config = run_config()
    with distributed(config):
        initialize_parallel(config.parallel, 0)
        model, given, aspo = existing_model(config.parallel), variables(0), adapter()
        get_model_config(model).calculate_per_token_loss = False
        aspo.aspo_step(model, given["tokens"], positions(), aspo.rl_batch(**given), LOSS)


def test_a_mean_per_micro_batch_is_refused() -> None:
    ((code, output),) = ends(1, mean_per_micro_batch)
    assert code == 1
    assert "ValueError: ASPO's loss is a sum over tokens: run Megatron with --calculate-per-token-loss" in output


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(BATCH, SEQUENCE - 1), (BATCH - 1,), (BATCH + 1,), (1, BATCH)])
def test_other_than_an_advantage_per_sequence_is_refused(shape: tuple[int, ...], packed: bool) -> None:
    given: dict[str, Any] = variables(0)
    if packed:
        given = one_bin(given) | {"seq_starts": STARTS, "seq_lengths": [SEQUENCE] * BATCH}
    adapter().rl_batch(**given)
    with pytest.raises(ValueError, match=rf"^advantages has shape \{list(shape)}, expected .{BATCH}. "):
        adapter().rl_batch(**given | {"advantages": torch.ones(shape)})


def test_a_bin_without_a_sequence_has_no_advantage() -> None:
    given: dict[str, Any] = one_bin(variables(0)) | {"seq_starts": [], "seq_lengths": [], "advantages": torch.ones(0)}
    batch = adapter().rl_batch(**given)
    assert batch["advantages"].shape == batch["targets"].shape


# --- The page's commands ---


def flags(*changes: str) -> tuple[list[str], dict[str, Any], PolicyLossConfig]:
    """The page's command after torchrun's own parser: the flags that Megatron's parser rejects, the integer values
    of the others, and the result of `rl_config`."""
    from megatron.training.arguments import add_megatron_arguments

    (command,) = (block for block in blocks("bash") if "train_rl.py" in block)
    done = subprocess.run(
        ["bash", "-euc", f"torchrun() {{ printf '%s\\0' \"$@\"; }}\n{command}"],
        env=os.environ | {"RANK": "7", "MASTER": "first-node"},
        capture_output=True,
        text=True,
        check=True,
    )
    launch = get_args_parser().parse_args(done.stdout.split("\0")[:-1])
    assert (launch.nnodes, launch.nproc_per_node, launch.node_rank, launch.training_script) == (
        *("8", "8", 7),
        "train_rl.py",
    )
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    known, unknown = parser.parse_known_args([*launch.training_script_args, *changes])
    sizes = {name: value for name, value in vars(known).items() if isinstance(value, int)}
    return unknown, sizes, adapter().rl_config(known)


def test_torchrun_and_megatron_take_the_pages_command() -> None:
    unknown, sizes, config = run(1, flags)[0]
    assert unknown == []
    updates, left = divmod(sizes["train_samples"], sizes["global_batch_size"])
    responses = sizes["grpo_prompts_per_step"] * sizes["grpo_group_size"]
    batches = updates // (sizes["grpo_iterations"] * (responses // sizes["global_batch_size"]))
    assert (left, batches) == (0, updates // 8)
    assert f"{updates} updates of {sizes['global_batch_size']}" in README
    assert f"{batches} batches of 8 updates" in README
    assert sizes["calculate_per_token_loss"]
    assert (config.objective, config.clip_low, config.clip_high) == ("aspo", 0.2, 0.2)
    assert find_objective(config)[1].dual_clip == 3.0
    assert (config.kl_coef, config.entropy_coef, config.rollout_correction) == (0, 0, "none")


def test_the_flags_are_read() -> None:
    assert adapter().rl_config(ARGS) == LOSS
    anchored = adapter().rl_config(ARGS, anchor="rollout", anchor_band=(0.2, 5))
    assert (anchored.anchor, anchored.rollout_correction, anchored.clip_high) == ("rollout", "none", 0.3)
    *_, config = run(1, flags, "--rl-inference-logprobs-is-correction")[0]
    assert config.rollout_correction == "truncate"  # without a limit
    assert config.rollout_ratio_high > torch.tensor(LOG_RATIO_LIMIT).exp()


@pytest.mark.parametrize(
    ("coefficient", "given", "bounds"),
    [
        (None, {"rollout_correction": "mask"}, (0.5, 2)),  # the library's own
        (1.5, {"rollout_correction": "mask"}, (0.5, 2)),
        (None, {"rollout_correction": "mask", "rollout_ratio_high": 5.0}, (0.5, 5)),
        (None, {"rollout_correction": "truncate"}, (0.5, 2)),
        (0.4, {"rollout_correction": "truncate"}, (0, 0.4)),
        (0.4, {"rollout_correction": "truncate", "rollout_ratio_high": 5.0}, (0, 5)),
        (1.5, {}, (0, 1.5)),
    ],
)
def test_a_correction_that_is_named_has_bounds(
    coefficient: float | None, given: dict[str, Any], bounds: tuple[float, float]
) -> None:
    args = SimpleNamespace(**vars(ARGS) | {"rl_importance_sampling_truncation_coef": coefficient})
    config = adapter().rl_config(args, **given)
    assert config.rollout_correction == given.get("rollout_correction", "truncate")
    assert (config.rollout_ratio_low, config.rollout_ratio_high) == bounds


def loop(*arguments: str) -> list[dict[str, float]]:
    """The metrics of the loop's updates, from weights that do not depend on the layout."""
    sys.path.insert(0, str(ADAPTER.parent))
    module: Any = importlib.import_module("train_loop")
    made = module.existing_model
    module.existing_model = lambda config: set_weights(made(config))
    return module.main(arguments)


def test_the_pages_schedule_has_its_imports() -> None:
    (block,) = (block for block in blocks("python") if "get_forward_backward_func" in block)
    names: dict[str, Any] = dict.fromkeys(
        ("data_iterator", "model", "num_microbatches", "seq_length", "micro_batch_size")
    )
    adapter()  # on the path, as by the page's PYTHONPATH
    imports, _, call = block.rpartition("\n\n")
    exec(imports, names)
    called = []
    names["get_forward_backward_func"] = lambda: lambda **given: called.append(given)
    exec(call, names)
    (given,) = called
    assert given["forward_step_func"].func is adapter().forward_step
    assert set(given) <= set(inspect.signature(forward_backward_no_pipelining).parameters)


def test_the_loop_is_the_same_on_four_ranks_as_on_one() -> None:
    (alone,) = run(1, loop)
    split = run(4, loop, "--tensor", "2", "--pipeline", "2")
    data_parallel = run(2, loop)
    for history in (split[2], split[3], *data_parallel):
        assert len(history) == len(alone) == 4
        for found, expected in zip(history, alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    first, *_, last = alone
    assert (first["aspo/ratio_pos"], first["aspo/approx_kl"]) == pytest.approx((1, 0), abs=1e-6)
    assert last["aspo/ratio_pos"] > 1.02
    assert last["aspo/ratio_neg"] < 0.98
    assert last["aspo/weight_pos"] < 1  # relative to the ratio
