"""Everything a run can be told, as frozen dataclasses that check their own fields; imports neither torch nor Megatron.

`config_file` makes them from a YAML file, `config_checks` knows what depends on several sections at once.
"""

from __future__ import annotations

import difflib
import math
import signal
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from megatron_aspo.config_data import DataConfig
from megatron_aspo.config_rewards import RewardConfig
from megatron_aspo.config_rules import require, require_known, require_positive
from megatron_aspo.fp8 import Fp8Config, stream_multiple

Objective = Literal["aspo", "grpo", "no_is", "response_mean_is", "cispo", "gspo", "sapo"]
"""The objectives that come with the package; any other is named by its import path, module:function."""

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


@dataclass(frozen=True)
class PolicyLossConfig:
    """The policy loss. DAPO is `grpo` with `clip_high=0.28`; dual-clip PPO is `grpo` with `dual_clip`.

    Attributes:
        objective: which weight function of the importance ratio multiplies the advantage: an `Objective`, or the import
            path `module:function` of one of your own (docs/extending.md).
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: the cap c of the (soft) dual clip, > 1; None turns it off. Used by aspo, grpo and
            response_mean_is.
        entropy_quantile: with a value q, tokens whose entropy exceeds the q-quantile of their response use
            `high_entropy_clip` on both sides (the Archer2.0 recipe: 0.8 and 0.4).
        high_entropy_clip: clip_low and clip_high of these tokens.
        aggregation: how per-token losses become one number. `seq-mean-token-sum-norm` divides every
            response's sum by the constant `norm_length` (Dr. GRPO).
        norm_length: tokens; for that aggregation alone. In a run null takes `rollout.max_response_tokens`.
        sapo_tau_pos, sapo_tau_neg: temperatures of SAPO's gate.
        kl_coef, kl_estimator: coefficient and estimator of KL(policy || reference); needs `ref_logprobs`.
        kl_tokens: "low_entropy" has the KL term only at tokens at or below the `entropy_quantile` of their response, so
            that those where the policy decides are free (Archer, arXiv 2507.15778).
        entropy_coef: coefficient of the entropy bonus; needs `entropy`.
        rollout_correction: how the policy gradient is weighted by rho = pi_old / pi_rollout, the mismatch between
            trainer and sampler: "truncate" (TIS) by min(rho, rollout_ratio_high), "mask" (MIS, IcePop) by rho
            inside [rollout_ratio_low, rollout_ratio_high] and 0 outside.
        rollout_ratio_low, rollout_ratio_high: the bounds of rho for it.
        rollout_sequence_low, rollout_sequence_high: responses whose geometric-mean rho lies outside are dropped.
        rollout_veto: responses with a token whose rho is below it are dropped.
    """

    objective: str = "aspo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    entropy_quantile: float | None = None
    high_entropy_clip: float = 0.4
    aggregation: Aggregation = "token-mean"
    norm_length: int | None = None
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_tokens: Literal["all", "low_entropy"] = "all"
    entropy_coef: float = 0.0
    rollout_correction: Literal["none", "truncate", "mask"] = "none"
    rollout_ratio_low: float = 0.5
    rollout_ratio_high: float = 2.0
    rollout_sequence_low: float | None = None
    rollout_sequence_high: float | None = None
    rollout_veto: float | None = None

    def __post_init__(self) -> None:
        require_known("objective", self.objective, typing.get_args(Objective))
        for name in ("aggregation", "kl_estimator", "kl_tokens", "rollout_correction"):
            allowed = typing.get_args(typing.get_type_hints(PolicyLossConfig)[name])
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        require(0 <= self.clip_low < 1, f"clip_low={self.clip_low} must lie in [0, 1)")
        require(0 <= self.clip_high < math.inf, f"clip_high={self.clip_high} must be finite and >= 0")
        require(
            self.dual_clip is None or self.dual_clip > 1,
            f"dual_clip={self.dual_clip} must be > 1 (or null to turn it off)",
        )
        require(
            self.entropy_quantile is None or 0 <= self.entropy_quantile <= 1,
            f"entropy_quantile={self.entropy_quantile} must lie in [0, 1]",
        )
        require(0 <= self.high_entropy_clip < 1, f"high_entropy_clip={self.high_entropy_clip} must lie in [0, 1)")
        require(self.sapo_tau_pos > 0 and self.sapo_tau_neg > 0, "sapo_tau_pos and sapo_tau_neg must be > 0")
        require(0 <= self.kl_coef < math.inf, f"kl_coef={self.kl_coef} must be finite and >= 0")
        require(math.isfinite(self.entropy_coef), f"entropy_coef={self.entropy_coef} must be finite")
        require(
            self.norm_length is None or 0 < self.norm_length < math.inf,
            f"norm_length={self.norm_length} must be finite and > 0",
        )
        require(
            0 <= self.rollout_ratio_low < self.rollout_ratio_high < math.inf,
            f"rollout_ratio_low={self.rollout_ratio_low} and rollout_ratio_high={self.rollout_ratio_high} "
            "must satisfy 0 <= low < high",
        )
        require(
            self.kl_tokens == "all" or self.entropy_quantile is not None,
            f"kl_tokens={self.kl_tokens} needs to know which these are; set entropy_quantile (Archer: 0.8)",
        )
        low, high = self.rollout_sequence_band
        require(
            0 <= low < high,
            f"rollout_sequence_low={self.rollout_sequence_low} and rollout_sequence_high="
            f"{self.rollout_sequence_high} must satisfy 0 <= low < high",
        )
        require(
            self.rollout_veto is None or 0 < self.rollout_veto < 1,
            f"rollout_veto={self.rollout_veto} must lie in (0, 1)",
        )

    @property
    def rollout_sequence_band(self) -> tuple[float, float]:
        """The band of a response's geometric-mean rho, open ends filled in."""
        low, high = self.rollout_sequence_low, self.rollout_sequence_high
        return 0.0 if low is None else low, math.inf if high is None else high

    @property
    def drops_responses(self) -> bool:
        """Whether whole responses can be dropped for their mismatch with the sampler."""
        return self.rollout_sequence_band != (0.0, math.inf) or self.rollout_veto is not None

    @property
    def uses_rollout_logprobs(self) -> bool:
        return self.rollout_correction != "none" or self.drops_responses


_SET_WITH_HF_PATH = ("hf_path", "dtype", "max_sequence_length", "moe_aux_loss_coef", "moe_z_loss_coef")


RMS_NORM_EPSILON = 1e-5
"""Of models that start from random weights."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama architecture (RMSNorm, rotary embeddings, SwiGLU, grouped-query attention), dense or
    with a mixture of experts in every layer: Hugging Face weights, or random ones of the shape given here.

    Attributes:
        hf_path: a folder in Hugging Face's format (config.json, `*.safetensors`, tokenizer files) or a hub id, of a
            Llama, Qwen2, Qwen3, Qwen3-MoE or DeepSeek-V3 model. FP8 weights with scales of blocks are read into
            `dtype`, layers for multi-token prediction left out. Shape and tokenizer come from there, and only `dtype`,
            `max_sequence_length` and the coefficients of the router's losses are settings. Empty: random weights.
        num_layers, hidden_size, ffn_hidden_size, num_attention_heads: the decoder's shape, in Megatron's words.
        num_query_groups: heads of keys and values; with as many as `num_attention_heads` attention is not grouped.
        max_sequence_length: tokens of prompt and response together, at most.
        rotary_base: the base of the rotary embeddings' frequencies.
        tie_embeddings: output layer and embedding are one weight.
        init_std: standard deviation of the initial weights.
        dtype: of the weights and activations; gradients and optimizer states are float32.
        num_experts: experts of a layer; 0 is a dense model, for which the `moe_` settings mean nothing.
        moe_top_k: experts that each token goes to.
        moe_ffn_hidden_size: of one expert; null takes ffn_hidden_size.
        moe_aux_loss_coef, moe_z_loss_coef: coefficients of the router's load-balancing loss and z-loss, which are
            means over all tokens of an update, prompts and padding included. They do not depend on `loss`.
    """

    hf_path: str = ""
    num_layers: int = 2
    hidden_size: int = 64
    ffn_hidden_size: int = 192
    num_attention_heads: int = 4
    num_query_groups: int = 2
    max_sequence_length: int = 128
    rotary_base: float = 10000.0
    tie_embeddings: bool = False
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_experts: int = 0
    moe_top_k: int = 2
    moe_ffn_hidden_size: int | None = None
    moe_aux_loss_coef: float = 1e-3
    moe_z_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        require_positive(self, "num_query_groups", "max_sequence_length", "rotary_base", "init_std")
        for f in fields(self) if self.hf_path else ():
            require(
                f.name in _SET_WITH_HF_PATH or getattr(self, f.name) == f.default,
                f"{f.name}={getattr(self, f.name)} is the Hugging Face model's to say; remove it, or hf_path",
            )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}",
        )
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"num_attention_heads={self.num_attention_heads} is not a multiple of "
            f"num_query_groups={self.num_query_groups}",
        )
        head = self.hidden_size // self.num_attention_heads
        require(head % 2 == 0, f"hidden_size / num_attention_heads = {head} must be even for rotary embeddings")
        require(self.num_experts >= 0, f"num_experts={self.num_experts} must be >= 0 (0 is a dense model)")
        require(
            self.num_experts == 0 or 1 <= self.moe_top_k <= self.num_experts,
            f"moe_top_k={self.moe_top_k} must lie in [1, num_experts={self.num_experts}]",
        )
        require(self.moe_ffn_hidden_size is None or self.moe_ffn_hidden_size > 0, "moe_ffn_hidden_size must be > 0")
        require(
            self.moe_aux_loss_coef >= 0 and self.moe_z_loss_coef >= 0,
            "moe_aux_loss_coef and moe_z_loss_coef must be >= 0",
        )

    @property
    def expert_hidden_size(self) -> int:
        """The feed-forward size of one expert."""
        return self.ffn_hidden_size if self.moe_ffn_hidden_size is None else self.moe_ffn_hidden_size


@dataclass(frozen=True)
class ParallelConfig:
    """How one replica of the model is spread over ranks; data parallelism takes what is left of the world.

    Attributes:
        tensor: ranks that share every weight matrix.
        pipeline: ranks that hold a part of the layers each.
        context: ranks that hold a part of every packed stream each (Megatron's context parallelism).
        expert: ranks that hold a part of the experts each. They are data-, context- or (with `expert_tensor`)
            tensor-parallel to each other, so expert parallelism needs no ranks of its own.
        expert_tensor: ranks that share the matrices of an expert; null takes `tensor`. With 1 the experts of a
            tensor-parallel group are whole, and `expert` may be larger.
        sequence_parallel: between the weight matrices each tensor-parallel rank keeps its share of the tokens only.
        first_stage_layers, last_stage_layers: layers of the first and the last pipeline stage, which have the
            embedding and the loss besides; null gives them as many as the others.
        overlap_grad_reduce: send gradients to the other data-parallel ranks while the last micro-batch's backward pass
            is still running.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    overlap_grad_reduce: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "tensor", "pipeline", "context", "expert")
        require(
            self.expert_tensor is None or 0 < self.expert_tensor <= self.tensor,
            f"expert_tensor={self.expert_tensor} must lie in [1, tensor={self.tensor}]",
        )
        for name in ("first_stage_layers", "last_stage_layers"):
            layers = getattr(self, name)
            require(layers is None or layers > 0, f"{name}={layers} must be > 0")
            require(layers is None or self.pipeline > 1, f"{name}={layers} needs pipeline > 1; remove it")
        require(
            not self.sequence_parallel or self.tensor > 1,
            "sequence_parallel=true needs tensor > 1; set parallel.sequence_parallel=false",
        )

    @property
    def model_parallel_size(self) -> int:
        """The fewest ranks that hold the layout; any world is a multiple of it."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert_tensor_size * self.expert)

    @property
    def expert_tensor_size(self) -> int:
        """The ranks that share the matrices of an expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def stream_multiple(self) -> int:
        """What a packed stream's length must be a multiple of, for the layout's sake: its context-parallel parts are
        pairs of chunks, and under sequence parallelism every part is spread evenly over the tensor-parallel ranks."""
        share = self.tensor if self.sequence_parallel else 1
        return math.lcm(2 * self.context, share * self.context) if self.context > 1 else share


ENGINES = ("megatron", "vllm")
"""The rollout engines that come with the package; any other is named by its import path, module:class."""


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled from the policy.

    Attributes:
        engine: "megatron" samples from the training model itself; "vllm" from vLLM, beside it in the same ranks or in
            ranks of its own; `module:class` is an engine of your own (docs/extending.md).
        prompts_per_step: prompt groups that enter one training step.
        responses_per_prompt: group size G.
        temperature: 0 is greedy. The trainer's log-probs are those of the same tempered distribution.
        top_p: nucleus sampling; log-probs stay those of the un-truncated distribution, with vLLM those of the nucleus.
        top_k: sample from this many most likely tokens; 0 is all of them. vLLM only.
        stop: strings that end a response (kept in it), besides the end-of-sequence token.
        max_response_tokens: upper limit; a response cut there has finish_reason "length".
        max_rounds: generation rounds per step that dynamic sampling may use to refill dropped groups.
        dynamic_sampling: drop groups whose scores are all equal, and refill. A penalty on length alone keeps no group.
        batch_size: responses decoded at once on a rank.
        tensor: consecutive ranks that share one copy of vLLM's weights; it need not be `parallel.tensor`. This and what
            follows is for vLLM.
        kv_cache_gb: GiB a rank for vLLM's keys and values.
        sleep_level: what vLLM gives back on a GPU while the policy is trained: 1 its keys and values (the weights wait
            in host memory), 2 its weights too; 0 is nothing.
        refit_bucket_mb: MiB of weights that travel at once from the policy to vLLM.
        refit_checksum: compare checksums of the weights at every refit: over all ranks, between the two sides of a
            channel, and with vLLM's own copies where these are not packed or split.
        quantization: "fp8" has vLLM's linear layers in FP8 (E4M3), one scale for an output channel of a weight, made
            anew at each refit, and one for a token. For model.dtype=bfloat16; slow on a CPU.
        ranks: how many of the launcher's ranks, its last ones, only generate; the others train. 0: all ranks do both in
            turn.
        max_staleness: with `ranks`, how many batches are generated ahead while the policy is trained. The batch of step
            n is written by the weights after step n - 1 - max_staleness (the initial ones where there is none).
    """

    engine: str = "megatron"
    prompts_per_step: int = 32
    responses_per_prompt: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    max_response_tokens: int = 16
    dynamic_sampling: bool = True
    max_rounds: int = 4
    batch_size: int = 512
    tensor: int = 1
    kv_cache_gb: float = 1.0
    sleep_level: int = 2
    refit_bucket_mb: int = 512
    refit_checksum: bool = False
    quantization: Literal["none", "fp8"] = "none"
    ranks: int = 0
    max_staleness: int = 0

    def __post_init__(self) -> None:
        require_known("engine", self.engine, ENGINES)
        require_positive(self, "prompts_per_step", "max_response_tokens", "max_rounds", "batch_size")
        require_positive(self, "tensor", "kv_cache_gb", "refit_bucket_mb")
        require(self.sleep_level in (0, 1, 2), f"sleep_level={self.sleep_level} must be 0, 1 or 2")
        require(self.top_k >= 0, f"top_k={self.top_k} must be >= 0 (0 is all tokens)")
        require(self.ranks >= 0, f"ranks={self.ranks} must be >= 0 (0: no ranks that only generate)")
        require(self.max_staleness >= 0, f"max_staleness={self.max_staleness} must be >= 0")
        for name, off in (("top_k", 0), ("tensor", 1), ("ranks", 0), ("quantization", "none")):
            require(
                self.engine == "vllm" or getattr(self, name) == off,
                f"{name}={getattr(self, name)} is for vLLM; set rollout.engine=vllm, or {name}={off}",
            )
        require(
            self.ranks % self.tensor == 0,
            f"ranks={self.ranks} cannot be parted into replicas of tensor={self.tensor} ranks; make it a multiple",
        )
        require(
            self.max_staleness == 0 or self.ranks > 0,
            f"max_staleness={self.max_staleness} needs ranks that generate while others train; set rollout.ranks, or "
            "max_staleness=0",
        )
        require(
            self.responses_per_prompt >= 2,
            f"responses_per_prompt={self.responses_per_prompt} must be >= 2: group-relative advantages need a group",
        )
        require(
            self.temperature > 0,
            f"temperature={self.temperature} must be > 0",
        )
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        require(all(self.stop), "stop must not contain an empty string")


RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj")
"""Megatron's names of the parts of a layer that can be recomputed by themselves."""


@dataclass(frozen=True)
class TrainConfig:
    """One step: a rollout batch, then `epochs` passes over its mini-batches, one optimizer update each.

    Attributes:
        steps: rollout batches, of the whole run.
        mini_batch_prompts: prompt groups per optimizer update.
        epochs: passes over a rollout batch. Mini-batches times epochs are the updates that a batch gets; with one,
            every ratio is 1 and ASPO does nothing.
        max_tokens_per_micro_batch: upper limit of a packed stream's length, before context parallelism parts it.
        packing: False gives every sample a micro-batch row of its own.
        fused_head: make loss and gradients from the hidden states, chunk by chunk, without logits. False takes the
            model's logits.
        ratio_tolerance: the importance ratio must be 1 on the first mini-batch of a step; a warning tells
            when max `|log r|` exceeds this there.
        recompute: what the backward pass computes anew instead of keeping it: "full" whole layers, of which only the
            input is kept; "selective" the parts named in `recompute_modules`.
        recompute_method: with "full": "uniform" recomputes all layers, `recompute_layers` at a time; "block" the first
            `recompute_layers` of every pipeline stage.
        recompute_layers: see there.
        recompute_modules: with "selective", Megatron's names of what is recomputed.
        release_gradients: free the gradients' buffers from the last update of a step to the first of the next, while
            the rollout engine has the memory.
        router_replay: with experts: updates send each token to those that the pass for the old log-probs chose (R2).
            The load-balancing loss stays that of the router's own choice.
        log_samples: prompt groups of a logged step that are written to `samples.jsonl`, with the ratio and the weight
            of each token after the step's updates; 0 is none. Costs two forward passes of these samples.
        log_samples_every: steps from one logged step to the next; 0 logs the last only, which always is.
    """

    steps: int = 100
    mini_batch_prompts: int = 8
    epochs: int = 3
    max_tokens_per_micro_batch: int = 4096
    packing: bool = True
    fused_head: bool = True
    ratio_tolerance: float = 1e-5
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_layers: int = 1
    recompute_modules: tuple[str, ...] = ()
    release_gradients: bool = False
    router_replay: bool = False
    log_samples: int = 2
    log_samples_every: int = 10

    def __post_init__(self) -> None:
        require_positive(self, "mini_batch_prompts", "epochs", "max_tokens_per_micro_batch", "ratio_tolerance")
        require_positive(self, "recompute_layers")
        for module in self.recompute_modules:
            require(
                module in RECOMPUTE_MODULES,
                f"recompute_modules has {module!r}, which is not one of {', '.join(RECOMPUTE_MODULES)}",
            )
        require(
            (self.recompute == "selective") == bool(self.recompute_modules),
            f"recompute={self.recompute} with recompute_modules={list(self.recompute_modules)}: name modules with "
            "recompute=selective, and only there",
        )
        require(self.steps >= 0, f"steps={self.steps} must be >= 0")
        for name in ("log_samples", "log_samples_every"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be >= 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up to a constant learning rate (the paper's recipe: 1e-6 after 10 steps).

    Attributes:
        lr: the learning rate after the warm-up.
        lr_warmup_updates: optimizer updates over which it rises from 0.
        weight_decay: decoupled; not of biases and norms.
        adam_beta1, adam_beta2, adam_eps: Adam's.
        clip_grad: largest norm of the gradient; a longer one is scaled down to it. 0 is no limit.
        cpu_offload: fraction of the parameters whose optimizer state (float32 weights and moments) lies in host memory,
            where they are updated too.
        moments_dtype: of Adam's moments; bfloat16 is Transformer Engine's, for a GPU only.
    """

    lr: float = 1e-6
    lr_warmup_updates: int = 10
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    cpu_offload: float = 0.0
    moments_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require_positive(self, "lr", "adam_eps")
        require(0 <= self.cpu_offload <= 1, f"cpu_offload={self.cpu_offload} must lie in [0, 1]")
        require(
            not self.cpu_offload or self.moments_dtype == "float32",
            f"moments_dtype={self.moments_dtype} is for moments on the GPU; set cpu_offload=0 or moments_dtype=float32",
        )
        require(self.lr_warmup_updates >= 0, "lr_warmup_updates must be >= 0")
        require(self.weight_decay >= 0 and self.clip_grad >= 0, "weight_decay and clip_grad must be >= 0")
        require(
            0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1,
            "adam_beta1 and adam_beta2 must lie in [0, 1)",
        )


@dataclass(frozen=True)
class WarmupConfig:
    """Supervised warm-up of a model that starts from random weights, through the same training step.

    It imitates a pre-training corpus: `wrong_fraction` of the demonstrations carry a wrong answer.
    Its result is cached, keyed by everything that went into it.

    Attributes:
        updates: optimizer updates; 0 is no warm-up.
        batch_prompts: demonstrations an update.
        lr: its learning rate, constant.
        wrong_fraction: share of demonstrations with a wrong answer.
        cache_dir: where results are kept.
    """

    updates: int = 0
    batch_prompts: int = 128
    lr: float = 3e-3
    wrong_fraction: float = 0.6
    cache_dir: str = "runs/cache"

    def __post_init__(self) -> None:
        require(self.updates >= 0, f"updates={self.updates} must be >= 0")
        require_positive(self, "batch_prompts", "lr")
        require(0 <= self.wrong_fraction < 1, f"wrong_fraction={self.wrong_fraction} must lie in [0, 1)")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in `runs/<name>/checkpoints`.

    Attributes:
        every: steps between checkpoints; 0 saves only the last.
        keep: how many of the newest to keep; 0 keeps all.
        resume: "never" refuses a run directory that has checkpoints; "auto" continues from the newest
            complete one, or starts anew where there is none; anything else is the path of a checkpoint.
        stop_signals: on any of these a run finishes its step, saves, writes the step to `runs/<name>/interrupted` and
            ends with exit code 0; [] leaves signals alone.
    """

    every: int = 25
    keep: int = 2
    resume: str = "never"
    stop_signals: tuple[str, ...] = ("SIGUSR1", "SIGTERM")

    def __post_init__(self) -> None:
        require(self.every >= 0 and self.keep >= 0, "every and keep must be >= 0")
        known = [s.name for s in signal.Signals if s not in (signal.SIGKILL, signal.SIGSTOP)]
        for name in self.stop_signals:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            require(name in known, f"stop_signals: {name} is no signal that can be caught{hint}")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out prompts while training: the mean over samples (avg@k), and greedy.

    Attributes:
        every: steps between evaluations; 0 evaluates only before and after training.
        responses_per_prompt: k, samples of each prompt.
        temperature: of these samples.
    """

    every: int = 10
    responses_per_prompt: int = 4
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.every >= 0, "every must be >= 0")
        require_positive(self, "responses_per_prompt", "temperature")


GPUS = ("a100", "h100", "h200", "b200")
"""Of which the planner knows memory and speed."""


@dataclass(frozen=True)
class ClusterConfig:
    """The machines that a run is meant for. Nothing is started by it: it is what `megatron-aspo plan` plans for.

    Attributes:
        nodes, gpus_per_node: how many.
        gpu: of which kind: a100, h100, h200 or b200.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"

    def __post_init__(self) -> None:
        require_positive(self, "nodes", "gpus_per_node")
        require(self.gpu in GPUS, f"gpu={self.gpu!r} is not one of {', '.join(GPUS)}")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
        name: of the run; its folder is `output_dir/name`.
        output_dir: the folder of all runs.
        seed: of initial weights and sampling. Problems have seeds of their own (`data.seed`, `data.eval_seed`).
    """

    name: str
    output_dir: str = "runs"
    seed: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig | None = None

    def __post_init__(self) -> None:
        require(
            self.name not in ("", ".", "..") and "/" not in self.name,
            f"name={self.name!r} must be a folder's name",
        )
        require(0 <= self.seed < 1 << 31, f"seed={self.seed} must lie in [0, 2^31)")

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def stream_multiple(self) -> int:
        """What a packed stream's length is padded to a multiple of."""
        return stream_multiple(self.fp8, self.parallel)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates per rollout batch: mini-batches x epochs."""
        return math.ceil(self.rollout.prompts_per_step / self.train.mini_batch_prompts) * self.train.epochs


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers, fit for YAML or JSON."""
    return asdict(config)


def colocated(config: RunConfig) -> RunConfig:
    """The same without ranks that only generate: what commands other than training need."""
    return replace(config, rollout=replace(config.rollout, ranks=0, max_staleness=0))
