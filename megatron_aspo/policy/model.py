"""From a configuration to Megatron-Core's GPTModel, with random or Hugging Face's weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_aspo.batch import MicroBatch
from megatron_aspo.config.checks import check_router_replay
from megatron_aspo.config.fp8 import Fp8Config, check_fp8_device, check_fp8_layout
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.errors import UserError
from megatron_aspo.policy import rotary, router_replay
from megatron_aspo.policy.architecture import Architecture
from megatron_aspo.policy.layer_specs import block_spec, uses_engine

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(config: RunConfig, vocab_size: int) -> list[DistributedDataParallel]:
    """This rank's chunks of the model, with random weights or Hugging Face's, wrapped for data parallelism.

    On a CPU random weights do not depend on the layout: whole weights are drawn before they are cut. On a GPU every
    rank draws its own part. A vocabulary of Hugging Face's is padded to a multiple of the tensor-parallel size with
    rows of zeros, which the loss gives no probability.

    Raises:
        UserError: the vocabulary or shape does not fit `config.parallel` or `config.fp8`; no GPU supports `config.fp8`;
            the folder of weights cannot be read, has an unknown architecture, or a missing or unknown tensor.
    """
    train = config.train
    needs_engine = sorted({"layernorm", "moe_act", "mla_up_proj"}.intersection(train.recompute_modules))
    if train.recompute == "selective" and needs_engine and importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            f"train.recompute_modules={needs_engine} needs Transformer Engine in this Megatron-Core, which is not "
            "installed; recompute mlp or moe, or set train.recompute=full"
        )
    check_fp8_device(config.fp8, *_cuda_versions())
    architecture = read_architecture(config.model, config.parallel, vocab_size)
    check_fp8_layout(architecture.sizes, config.fp8, config.parallel, "model.")
    models: list[torch.nn.Module] = []
    for gpt in build_gpt(config, architecture, vocab_size):
        modules: list[Any] = list(gpt.modules())
        for module in modules:
            # Transformer Engine's layers add weight gradients to the float32 buffer within the matrix product.
            # Megatron's `gradient_accumulation_fusion` also concerns the output layer, whose kernel is apex's.
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
        model = gpt.cuda() if torch.cuda.is_available() else gpt
        models.append(Float16Module(gpt.config, model) if gpt.config.bf16 else model)
    if config.model.hf_path:
        from megatron_aspo.policy.hf import weights as hf

        hf.load_weights(config.model.hf_path, models)
    return _wrap(models, config.parallel)


def _wrap(models: list[Any], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    transformer = models[0].config  # one for all chunks
    chunks: list[DistributedDataParallel] = []
    for model in models:
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        # A later chunk's communication is hidden by the other chunks' computation, in one piece.
        chunks.append(DistributedDataParallel(transformer, settings, model, disable_bucketing=bool(chunks)))
        chunks[-1].broadcast_params()
    if parallel.overlap_grad_reduce:  # with the last micro-batch
        no_sync: list[Any] = [chunk.no_sync for chunk in chunks]
        transformer.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return chunks


def read_architecture(model: ModelConfig, parallel: ParallelConfig, vocab_size: int) -> Architecture:
    """The shape of the model, from `model.hf_path` or from the section's own settings.

    Raises:
        UserError: it cannot be read, or its vocabulary or shape does not fit `parallel`.
    """
    if model.hf_path:
        from megatron_aspo.policy.hf import bridge  # takes seconds to import

        return bridge.read_architecture(model, parallel, vocab_size)
    if vocab_size % parallel.tensor:
        raise UserError(
            f"the vocabulary of {vocab_size} tokens is not a multiple of parallel.tensor={parallel.tensor}; change it"
        )
    return Architecture.from_config(model)


def build_gpt(config: RunConfig, architecture: Architecture, vocab_size: int) -> list[GPTModel]:
    """This rank's chunks of the model, without the wrappers for training; one without virtual pipeline stages."""
    rotary.install()
    router_replay.choose_in_one_order()
    transformer = transformer_config(config, architecture)
    chunks = config.parallel.virtual_pipeline
    stages = range(chunks) if chunks > 1 else [None]
    return [_build_chunk(config, architecture, transformer, vocab_size, stage) for stage in stages]


def _build_chunk(
    config: RunConfig,
    architecture: Architecture,
    transformer: TransformerConfig,
    vocab_size: int,
    stage: int | None,
) -> GPTModel:
    """The chunk of a virtual stage; the whole pipeline stage with None."""
    gpt = GPTModel(
        config=transformer,
        transformer_layer_spec=block_spec(transformer, stage),  # type: ignore[arg-type]  (also takes a block's)
        vocab_size=vocab_size + -vocab_size % config.parallel.tensor,
        max_sequence_length=config.model.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        position_embedding_type="rope",
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,  # type: ignore[arg-type]  (an int in the annotation only)
        share_embeddings_and_output_weights=architecture.tie_embeddings,
        parallel_output=True,
        vp_stage=stage,
    )
    if not transformer.multi_latent_attention:
        # Under context parallelism Megatron would cut the table of rotary angles for batches too. Only packed streams
        # are split here, and they look up positions in the whole table; decoding has whole sequences.
        gpt.rotary_pos_emb.cp_group = None
        if architecture.inv_freq is not None:
            gpt.rotary_pos_emb.inv_freq = architecture.inv_freq.to(gpt.rotary_pos_emb.inv_freq.device)
    return gpt


def transformer_config(config: RunConfig, architecture: Architecture) -> TransformerConfig:
    """Megatron's configuration. Fusions that need Transformer Engine or apex are off without it.

    Raises:
        UserError: see `check_router_replay`.
    """
    with_engine = uses_engine()
    model, parallel = config.model, config.parallel
    dtype = _DTYPES[model.dtype]
    kind = MLATransformerConfig if architecture.transformer.get("multi_latent_attention") else TransformerConfig
    check_router_replay(config.train, architecture.num_experts)
    experts = _expert_settings(config) if architecture.num_experts else {}
    virtual = {}
    if parallel.virtual_pipeline > 1:
        # In a batch, two stages would take the activations and gradients that they exchange for each other.
        virtual = {"batch_p2p_comm": False, "overlap_p2p_comm": True}
        virtual |= {"virtual_pipeline_model_parallel_size": parallel.virtual_pipeline}
    ours: dict[str, Any] = dict(
        **virtual,
        **experts,
        **_recompute_settings(config.train),
        **fp8_settings(config.fp8),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # On a GPU Megatron seeds ranks apart: from the CPU's one generator all would draw the same experts.
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=not model.hf_path,
        calculate_per_token_loss=True,
        bias_activation_fusion=with_engine,
        # Latent attention takes `rotary`: Megatron's fused kernel for it is experimental, and for YaRN alone.
        apply_rope_fusion=with_engine and kind is TransformerConfig,
        masked_softmax_fusion=False,
    )
    transformer = kind(**(architecture.transformer | ours))
    # Megatron-Bridge reads it from the configuration.
    setattr(transformer, "share_embeddings_and_output_weights", architecture.tie_embeddings)  # noqa: B010
    return transformer


def _recompute_settings(train: TrainConfig) -> dict[str, Any]:
    if train.recompute == "full":
        method = {"recompute_method": train.recompute_method, "recompute_num_layers": train.recompute_layers}
        return {"recompute_granularity": "full"} | method
    if train.recompute == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(train.recompute_modules) or ["core_attn"],
        }
    return {}


def fp8_settings(fp8: Fp8Config) -> dict[str, Any]:
    """Megatron's settings. The output layer is never in FP8 (`fp8_output_proj` stays off)."""
    if fp8.recipe is None:
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.mcore_recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": fp8.bf16_layers > 0,
        "num_layers_at_start_in_bf16": fp8.bf16_layers_at_start,
        "num_layers_at_end_in_bf16": fp8.bf16_layers_at_end,
    }


def _cuda_versions() -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """The GPU's compute capability, None without one, and the CUDA version of this build of torch."""
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return (torch.cuda.get_device_capability() if torch.cuda.is_available() else None), (int(major), int(minor))


def _expert_settings(config: RunConfig) -> dict[str, Any]:
    with_engine, model, parallel = uses_engine(), config.model, config.parallel
    _check_dispatcher(parallel)
    return {
        # FP8 products need the number of each expert's tokens padded.
        "moe_router_padding_for_quantization": bool(fp8_settings(config.fp8)),
        "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss_coef else "none",
        "moe_aux_loss_coeff": model.moe_aux_loss_coef,
        "moe_z_loss_coeff": model.moe_z_loss_coef or None,
        "moe_token_dispatcher_type": parallel.moe_dispatcher,
        "moe_flex_dispatcher_backend": parallel.moe_flex_backend,
        "moe_grouped_gemm": with_engine,
        # Unfused, a token's experts are summed by atomic additions in bfloat16: log-probs would differ between passes.
        "moe_permute_fusion": with_engine,
        "moe_router_dtype": "fp32",
        "moe_enable_routing_replay": config.train.router_replay != "none",
    }


def _check_dispatcher(parallel: ParallelConfig) -> None:
    """Raise UserError if `parallel.moe_dispatcher` has no GPU, or no kernels of `parallel.moe_flex_backend`."""
    backend = parallel.moe_flex_backend
    has_kernels = fused_a2a.HAVE_DEEP_EP if backend == "deepep" else fused_a2a.HAVE_HYBRIDEP
    if parallel.moe_dispatcher == "flex" and not (has_kernels and torch.cuda.is_available()):
        raise UserError(
            f"parallel.moe_dispatcher=flex needs a GPU and the package deep_ep with {backend}; build it from "
            "github.com/deepseek-ai/DeepEP, or set parallel.moe_dispatcher=alltoall"
        )


def model_inputs(batch: MicroBatch) -> dict[str, Any]:
    """The keyword arguments of the model's forward pass for a packed stream (THD: batch dimension 1).

    Under context parallelism the tokens are this rank's part, and the segments those of the whole stream. Segments
    include their padding, so the padded lengths (`cu_seqlens_q_padded`) are not needed.
    """
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    return {
        "input_ids": batch.tokens[None],
        "position_ids": batch.position_ids[None],
        "attention_mask": None,
        "packed_seq_params": packed,
    }
