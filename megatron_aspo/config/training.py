"""Settings of training: steps, optimizer, warm-up, checkpoints, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megatron_aspo.config.fields import SETTINGS, Fraction, Text
from megatron_aspo.config.rules import require

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj"]
"""Megatron's names of the parts of a layer that can be recomputed on their own."""

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=SETTINGS)
class TrainConfig:
    """One step: a rollout batch, then `epochs` passes over its mini-batches, with one optimizer update each."""

    steps: NonNegativeInt = 100
    """Rollout batches of the whole run."""
    mini_batch_prompts: PositiveInt = 8
    """Prompt groups per optimizer update."""
    epochs: PositiveInt = 3
    """Passes over a rollout batch. ASPO needs at least two updates (mini-batches times epochs) per batch."""
    max_tokens_per_micro_batch: PositiveInt = 4096
    """Longest packed stream, before context parallelism splits it."""
    packing: bool = True
    """Pack samples into streams. False gives every sample a micro-batch row of its own."""
    fused_head: bool = True
    """Compute loss and gradients from hidden states in chunks, without logits. False uses the model's logits."""
    ratio_tolerance: PositiveFloat = 1e-5
    """Largest `|log r|` without a warning on the first mini-batch of a step, where every ratio must be 1; not with
    `loss.anchor=rollout`."""
    mismatch_every: NonNegativeInt = 10
    """With `loss.anchor=rollout`: steps between passes for old log-probs, from the first step. Only `mismatch/*` and
    the parts of the ratio (`loss/rollout_logprob_diff`, `loss/rollout_kl`, `loss/update_logprob_diff`) need them. 0 is
    none. With `loss.anchor=trainer` every step has them."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes: "full" whole layers, "selective" the `recompute_modules`."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With "full": "uniform" recomputes all layers, `recompute_layers` at a time; "block" the first `recompute_layers`
    of every pipeline stage."""
    recompute_layers: PositiveInt = 1
    """Layers for `recompute_method`."""
    recompute_modules: tuple[RecomputeModule, ...] = ()
    """With "selective": the parts of a layer to recompute; none named is core_attn, as in Megatron, which
    saves little where attention is fused."""
    release_gradients: bool = False
    """Free the gradient buffers between the updates of two steps, while the rollout engine needs the memory."""
    router_replay: Literal["none", "trainer", "sampler"] = "none"
    """For experts: updates route each token to the experts chosen in the pass for the old log-probs ("trainer", R2), or
    that pass and the updates to those that vLLM chose when it sampled ("sampler", R3). The load-balancing loss still
    uses the router's own choice, and the reference policy routes freely."""
    log_samples: NonNegativeInt = 2
    """Prompt groups of a logged step that are written to `samples.jsonl`, with the ratio and weight of each token after
    the step's updates; 0 is none. Costs a forward pass of the mini-batch that has them."""
    log_samples_every: NonNegativeInt = 10
    """Steps between logged steps. The last step is always logged; 0 logs only that."""
    wait_limit_hours: PositiveFloat = 24.0
    """Longest wait for another rank's responses, verdicts or messages. After a minute, then ever more rarely, a line
    names the ranks waited for; at the limit the run ends with exit code 1."""


@dataclass(frozen=True, config=SETTINGS)
class OptimizerConfig:
    """AdamW with a linear warm-up to a constant learning rate (the paper's recipe: 1e-6 after 10 steps)."""

    lr: PositiveFloat = 1e-6
    """Learning rate after the warm-up."""
    lr_warmup_updates: NonNegativeInt = 10
    """Optimizer updates over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; biases and norms have none."""
    adam_beta1: Beta = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Beta = 0.999
    """Decay of Adam's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the gradient; longer gradients are scaled down to it. 0 is no limit."""
    max_skipped_updates: PositiveInt = 5
    """Updates whose gradient is not finite are skipped. This many in a row end the run with exit code 1."""
    cpu_offload: Fraction = 0.0
    """Fraction of the parameters whose float32 weights and moments are kept and updated in host memory."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of Adam's moments. bfloat16 needs Transformer Engine on a GPU."""

    def __post_init__(self) -> None:
        dtype = self.moments_dtype
        require(not self.cpu_offload or dtype == "float32", f"moments_dtype={dtype} needs cpu_offload=0")


@dataclass(frozen=True, config=SETTINGS)
class WarmupConfig:
    """Supervised warm-up of a model that starts from random weights, as if pre-trained on a corpus with wrong answers.
    Its result is cached, keyed by all of its inputs."""

    updates: NonNegativeInt = 0
    """Optimizer updates; 0 is no warm-up."""
    batch_prompts: PositiveInt = 128
    """Demonstrations per update."""
    lr: PositiveFloat = 3e-3
    """Learning rate of the warm-up."""
    lr_decay: bool = False
    """Lower the learning rate linearly to 0 at the warm-up's end. False: it stays constant."""
    wrong_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Share of demonstrations with a wrong answer."""
    seed: Annotated[int | None, Field(ge=0, lt=1 << 30)] = None
    """Seed of the initial weights and of the demonstrations, so that runs of several seeds share a warm start; null
    takes the run's `seed` and `data.seed`."""
    cache_dir: Text = "runs/cache"
    """Folder of the cached results."""


@dataclass(frozen=True, config=SETTINGS)
class CheckpointConfig:
    """Checkpoints in `runs/<name>/checkpoints`."""

    every: NonNegativeInt = 25
    """Steps between checkpoints; 0 saves only the last step."""
    keep: NonNegativeInt = 2
    """Newest checkpoints to keep; 0 keeps all."""
    asynchronous: bool = False
    """Train on while the files of a checkpoint are written. It is published at the end of the first step that finds
    them complete, at the latest before the next checkpoint. The host holds a copy of the state until then."""
    resume: Text = "never"
    """"never" refuses a run directory that has checkpoints. "auto" continues from the newest complete checkpoint, or
    starts a new run if there is none. Anything else is the path of a checkpoint."""


@dataclass(frozen=True, config=SETTINGS)
class EvalConfig:
    """Evaluation on the held-out prompts during training: the mean over samples (avg@k), and greedy."""

    every: NonNegativeInt = 10
    """Steps between evaluations; 0 is none between the first step and the last."""
    at_start: bool = True
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step, independent of `every`."""
    responses_per_prompt: PositiveInt = 4
    """Samples per prompt (k)."""
    temperature: PositiveFloat = 1.0
    """Temperature of these samples."""
