"""Wrong input of the loss library: a ValueError that names the argument, before any collective."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aspo.config import PolicyLossConfig
from megatron_aspo.loss import (
    fused_linear_logprobs,
    fused_linear_policy_loss,
    megatron_logprobs_head,
    megatron_loss_func,
    megatron_loss_head,
    policy_loss,
    response_terms_of,
    vocab_parallel_logprobs,
)
from megatron_aspo.loss.tokens import ResponseTerms

T, H, V = 4, 3, 6


def config_of(**fields: Any) -> PolicyLossConfig:
    return PolicyLossConfig(**fields)


ONES = torch.ones(2, T)

PER_TOKEN = {
    "old_logprobs": -ONES,
    "advantages": ONES,
    "loss_mask": ONES,
    "ref_logprobs": -ONES,
    "rollout_logprobs": -ONES,
    "sequence_ids": torch.zeros(2, T).long(),
}
LOGITS = {"logits": torch.zeros(2, T, V), "targets": torch.zeros(2, T).long(), "tp_group": None}
HIDDEN = {"hidden": torch.zeros(2, T, H), "weight": torch.zeros(V, H), "targets": torch.zeros(2, T).long()}
DEFAULT = {"config": PolicyLossConfig()}


def layer(sequence_parallel: bool = False, bias: Tensor | None = None) -> Any:
    layer: Any = torch.nn.Linear(H, V)
    layer.weight = torch.nn.Parameter(torch.zeros(V, H))
    layer.bias = None if bias is None else torch.nn.Parameter(bias)
    layer.sequence_parallel, layer.tp_group = sequence_parallel, None
    return layer


def loss_head(output_layer: Any = None, output_weight: Any = None, model: Any = None, **context: Any) -> Any:
    """As GPTModel calls it: hidden states [sequence, batch, H], everything else [batch, sequence]."""
    settings = {"calculate_per_token_loss": True, "grad_scale_func": None} | (model or {})
    hidden = context.pop("hidden", torch.zeros(T, 2, H))
    head = megatron_loss_head if "config" in context else megatron_logprobs_head
    output_layer = output_layer or layer()
    output_layer.tp_group = context.get("tp_group")
    return head(
        hidden_states=hidden,
        output_layer=output_layer,
        output_weight=output_weight,
        config=SimpleNamespace(**settings),
        context=context,
    )


TARGETS = {"targets": HIDDEN["targets"]}
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "fused_linear_policy_loss": (fused_linear_policy_loss, HIDDEN | PER_TOKEN | DEFAULT),
    "fused_linear_logprobs": (fused_linear_logprobs, HIDDEN | {"loss_mask": ONES}),
    "policy_loss": (policy_loss, {"logprobs": -ONES, "entropy": ONES} | PER_TOKEN | DEFAULT),
    "vocab_parallel_logprobs": (vocab_parallel_logprobs, LOGITS | {"loss_mask": ONES}),
    "megatron_loss_func": (megatron_loss_func, LOGITS | PER_TOKEN | DEFAULT),
    "megatron_loss_head": (loss_head, TARGETS | PER_TOKEN | DEFAULT),
    "megatron_logprobs_head": (loss_head, TARGETS | {"loss_mask": ONES}),
}
LOSSES = ("fused_linear_policy_loss", "policy_loss", "megatron_loss_func", "megatron_loss_head")
FUSED = ("fused_linear_policy_loss", "fused_linear_logprobs", "megatron_loss_head", "megatron_logprobs_head")
OF_HIDDEN = ("fused_linear_policy_loss", "fused_linear_logprobs")
OF_LOGITS = ("vocab_parallel_logprobs", "megatron_loss_func")
HEADS = ("megatron_loss_head", "megatron_logprobs_head")
WITH_TERMS = ("fused_linear_policy_loss", "policy_loss", "megatron_loss_head")
ALL = tuple(FUNCTIONS)

Case = tuple[tuple[str, ...], dict[str, Any], str]
CASES: list[Case] = [
    # Shapes.
    (OF_HIDDEN, {"hidden": torch.zeros(H)}, "hidden must be .*, H., not 1-d"),
    (OF_HIDDEN, {"hidden": torch.zeros(2, T, H + 1)}, r"weight must be .V/tp, 4. .*, not .6, 3."),
    (OF_HIDDEN, {"hidden": torch.zeros(T, H)}, r"targets has shape .2, 4., expected .4. .*hidden"),
    (HEADS, {"hidden": torch.zeros(T + 1, 2, H)}, r"targets has shape .2, 4., expected .2, 5. .*hidden"),
    (OF_HIDDEN, {"weight": torch.zeros(H)}, "weight must be"),
    (OF_HIDDEN, {"weight": torch.zeros(H, V)}, "weight must be"),
    (OF_HIDDEN, {"weight": torch.zeros(1, V, H)}, "weight must be"),
    (HEADS, {"output_weight": torch.zeros(H, V)}, "weight must be"),
    (("vocab_parallel_logprobs",), {"logits": torch.tensor(0.0)}, "logits must be .*, not a scalar"),
    (OF_LOGITS, {"logits": torch.zeros(2, T + 1, V)}, "targets has shape"),
    ((*FUSED, *OF_LOGITS), {"targets": torch.zeros(2, T + 1).long()}, "targets has shape"),
    ((*FUSED, *OF_LOGITS), {"targets": torch.zeros(2 * T).long()}, "targets has shape"),
    (("policy_loss",), {"logprobs": torch.tensor(0.0)}, "logprobs must be"),
    (("policy_loss",), {"entropy": torch.zeros(2, T + 1)}, "entropy has shape"),
    *(
        (LOSSES, {name: torch.zeros(*shape).to(v.dtype)}, f"{name} has shape .{said}., expected .2, 4. .one per token")
        for shape, said in (((2, T + 1), "2, 5"), ((2,), "2"), ((2 * T,), "8"), ((T, 2), "4, 2"))
        for name, v in PER_TOKEN.items()
    ),
    (
        ("fused_linear_logprobs", "megatron_logprobs_head", "vocab_parallel_logprobs"),
        {"loss_mask": torch.zeros(2, 1)},
        "loss_mask has shape .2, 1., expected .2, 4.",
    ),
    # Types.
    (OF_HIDDEN, {"hidden": torch.zeros(2, T, H).long()}, "hidden must be floating point, not torch.int64"),
    (
        OF_HIDDEN,
        {"hidden": torch.zeros(2, T, H, dtype=torch.complex64)},
        "hidden must be floating point, not torch.complex64",
    ),
    (OF_HIDDEN, {"weight": torch.zeros(V, H).int()}, "weight must be floating point, not torch.int32"),
    (OF_HIDDEN, {"weight": torch.zeros(V, H).bfloat16()}, "weight is torch.bfloat16, hidden torch.float32"),
    (HEADS, {"hidden": torch.zeros(T, 2, H).half()}, "weight is torch.float32, hidden torch.float16"),
    (OF_LOGITS, {"logits": torch.zeros(2, T, V).long()}, "logits must be floating point"),
    ((*FUSED, *OF_LOGITS), {"targets": torch.zeros(2, T)}, "targets must be integers, not torch.float32"),
    ((*FUSED, *OF_LOGITS), {"targets": torch.zeros(2, T).bool()}, "targets must be integers, not torch.bool"),
    (("policy_loss",), {"logprobs": torch.zeros(2, T).long()}, "logprobs must be a floating-point"),
    (("policy_loss",), {"entropy": torch.zeros(2, T).long()}, "entropy must be floating point"),
    *(
        (LOSSES, {name: torch.zeros(2, T).long()}, f"{name} must be floating point, not torch.int64")
        for name in ("old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
    ),
    (LOSSES, {"sequence_ids": torch.zeros(2, T)}, "sequence_ids must be integers"),
    (LOSSES, {"sequence_ids": torch.zeros(2, T).bool()}, "sequence_ids must be integers"),
    # Token ids and the vocabulary.
    *(
        ((*FUSED, *OF_LOGITS), {"targets": torch.full((2, T), i)}, f"targets holds token id {i}, outside .* .0, 6.")
        for i in (V, -1, -100, 1 << 40)
    ),
    (
        (*FUSED, *OF_LOGITS),
        {"targets": torch.full((2, T), V - 1), "vocab_size": V - 1},
        "targets holds token id 5, outside the vocabulary .0, 5.",
    ),
    ((*FUSED, *OF_LOGITS), {"vocab_size": V + 1}, f"vocab_size={V + 1} does not fit"),
    *(((*FUSED, *OF_LOGITS), {"vocab_size": size}, f"vocab_size={size} must be an integer >= 1") for size in (0, 0.5)),
    # Numbers.
    *((FUSED, {"chunk_size": size}, f"chunk_size={size} must be an integer >= 1") for size in (0, -1, 64.5)),
    *(
        ((*FUSED, *OF_LOGITS), {"temperature": value}, f"temperature={value} must be > 0")
        for value in (0, 0.0, -1.0, math.nan, math.inf)
    ),
    *((("fused_linear_policy_loss",), {"loss_scale": x}, f"loss_scale={x} must be > 0") for x in (0.0, -2.0, math.nan)),
    (("vocab_parallel_logprobs",), {"top_k": 2.5}, "top_k=2.5 must be an integer >= 1"),
    (("vocab_parallel_logprobs",), {"top_p": 0.0}, "top_p=0.0 must lie in"),
    (("fused_linear_policy_loss",), {"loss_scale": torch.ones(T)}, "loss_scale has shape .4., expected .1."),
    # What is missing, or of another kind.
    *(
        ((*LOSSES, "megatron_loss_head"), {name: None}, f"{name} must be a tensor, not NoneType")
        for name in ("advantages", "loss_mask")
    ),
    ((*FUSED, *OF_LOGITS), {"targets": None}, "targets must be a tensor"),
    (LOSSES, {"config": {"objective": "aspo"}}, "config must be a PolicyLossConfig, not dict"),
    (("policy_loss",), {"entropy": None, "config": PolicyLossConfig(entropy_coef=0.1)}, "entropy is missing"),
    (("policy_loss",), {"entropy": None, "config": PolicyLossConfig(entropy_quantile=0.5)}, "entropy is missing"),
    (LOSSES, {"ref_logprobs": None, "config": PolicyLossConfig(kl_coef=0.1)}, "ref_logprobs is missing.*kl_coef"),
    *(
        (LOSSES, {name: None, "config": config_of(**field)}, f"{name} is missing.*{next(iter(field))}")
        for name in ("rollout_logprobs", "old_logprobs")
        for field in ({"rollout_correction": "mask"}, {"rollout_veto": 0.1})
    ),
    (LOSSES, {"config": PolicyLossConfig(aggregation="seq-mean-token-sum-norm")}, "norm_length is missing"),
    (("fused_linear_policy_loss", "policy_loss"), {"loss_mask": 0 * ONES}, "loss_mask selects no token"),
    # Terms of responses across micro-batches, from another configuration or of other tokens.
    *(
        (WITH_TERMS, {"response_terms": ResponseTerms(), "config": config_of(**field)}, f"response_terms .* no {name}$")
        for name, field in (
            ("sequence_ratio", {"objective": "gspo"}),
            ("sequence_ratio", {"objective": "response_mean_is"}),
            ("entropy_limit", {"entropy_quantile": 0.5}),
            ("dropped", {"rollout_veto": 0.1}),
            ("count", {"aggregation": "seq-mean-token-sum"}),
        )
    ),
    *(
        (
            WITH_TERMS,
            {"response_terms": ResponseTerms(sequence_ratio=torch.ones(n)), "config": config_of(objective="gspo")},
            f"response_terms speaks of {n} tokens, these are 8",
        )
        for n in (1, 7, 9)
    ),
    # Groups.
    (OF_HIDDEN, {"sequence_parallel": True}, "sequence_parallel=True needs a tp_group"),
    (HEADS, {"output_layer": layer(sequence_parallel=True)}, "sequence_parallel=True needs a tp_group"),
    # Names.
    (
        ("megatron_loss_head",),
        {"advantage": ONES},
        "^output_processor_context has 'advantage'; it takes targets, old_logprobs, advantages, loss_mask, config, tp_",
    ),
    (
        ("megatron_logprobs_head",),
        {"advantages": ONES, "weight": ONES},
        "^output_processor_context has 'advantages', 'weight'; it takes targets, tp_group, .*, vocab_size, loss_mask$",
    ),
    # The model.
    (HEADS, {"output_layer": layer(bias=torch.zeros(V))}, "bias of the output layer"),
    (HEADS, {"model": {"use_mup": True}}, "muP"),
    (("megatron_loss_head",), {"model": {"calculate_per_token_loss": False}}, "needs calculate_per_token_loss=True"),
]


@pytest.mark.parametrize("name", ALL)
def test_the_input_that_is_made_wrong_below_is_right(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    function(**inputs)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        pytest.param(name, changes, message, id=f"{name}-{message}")
        for names, changes, message in CASES
        for name in names
    ],
)
def test_refuses(name: str, changes: dict[str, Any], message: str) -> None:
    function, inputs = FUNCTIONS[name]
    with pytest.raises(ValueError, match=message):
        function(**inputs | changes)


def test_response_terms_of_refuses() -> None:
    inputs = {"logprobs": -ONES, "entropy": ONES} | PER_TOKEN
    assert len(response_terms_of([inputs, inputs], config_of(objective="gspo"))) == 2
    for changes, message in (
        ({"sequence_ids": None}, "sequence_ids is missing in a micro-batch"),
        ({"logprobs": None}, "logprobs is missing in a micro-batch"),
        ({"old_logprobs": None}, "old_logprobs is missing in some of the micro-batches only"),
        ({"advantages": ONES.long()}, "advantages must be floating point"),
        ({"loss_mask": ONES[:1]}, "loss_mask has shape"),
        ({"entropy": ONES[:1]}, "entropy has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            response_terms_of([inputs, inputs | changes], config_of(objective="gspo"))


# --- With groups: nothing may have been sent when the error comes ---


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """Rank 0 of two, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class NoCollective(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace not in ("c10d", "_c10d_functional"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("world")
def test_the_watch_sees_collectives() -> None:
    group: Any = dist.group.WORLD
    for name in (*OF_HIDDEN, *OF_LOGITS):
        function, inputs = FUNCTIONS[name]
        with pytest.raises(AssertionError, match="c10d"), NoCollective():
            function(**inputs | {"tp_group": group})


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        pytest.param(name, changes, message, id=f"{name}-{message}")
        for names, changes, message in CASES
        for name in names
        if not {"sequence_parallel", "output_layer"} & set(changes) and "token id" not in message
    ],
)
def test_no_collective_is_started_with_wrong_input(name: str, changes: dict[str, Any], message: str) -> None:
    """Of two ranks that hold 6 tokens each; over the context-parallel group responses would be put together."""
    function, inputs = FUNCTIONS[name]
    group = dist.group.WORLD
    inputs = inputs | changes
    if name != "policy_loss":
        inputs = inputs | {"tp_group": group}
    if name in LOSSES and "selects no token" not in message:
        inputs = inputs | {"cp_group": group}
    if "vocab_size" in changes:
        inputs["vocab_size"] = 2 * V + 1
        message = "vocab_size=13 does not fit .*6 .* on each of 2 ranks of tp_group"
    with pytest.raises(ValueError, match=message), NoCollective():
        function(**inputs)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", [*FUSED, *OF_LOGITS])
@pytest.mark.parametrize(("token", "size"), [(2 * V, 2 * V), (2 * V - 1, 2 * V - 1), (-1, 2 * V)])
def test_token_ids_are_checked_against_the_whole_vocabulary(name: str, token: int, size: int) -> None:
    function, inputs = FUNCTIONS[name]
    inputs = inputs | {"targets": torch.full((2, T), token), "tp_group": dist.group.WORLD, "vocab_size": size}
    with pytest.raises(ValueError, match=f"token id {token}, outside the vocabulary .0, {size}."), NoCollective():
        function(**inputs)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("head", [megatron_loss_head, megatron_logprobs_head])
def test_a_tensor_parallel_group_of_another_size_than_the_layers_is_refused(head: Any) -> None:
    _, inputs = FUNCTIONS[head.__name__]
    whole = layer()
    whole.tp_group = dist.group.WORLD
    config = SimpleNamespace(calculate_per_token_loss=True, grad_scale_func=None)
    with pytest.raises(ValueError, match="tp_group has 1 ranks, the output layer is split over 2"), NoCollective():
        head(
            hidden_states=torch.zeros(T, 2, H),
            output_layer=whole,
            output_weight=None,
            config=config,
            context=inputs | {"tp_group": None},
        )


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("head", "context", "message"),
    [
        (megatron_loss_head, {}, "lacks 'targets', 'old_logprobs', 'advantages', 'loss_mask', 'config'; it takes tar"),
        (megatron_loss_head, TARGETS | PER_TOKEN, "lacks 'config'; it takes targets, .*, response_terms$"),
        (megatron_logprobs_head, {}, "lacks 'targets'; it takes targets, tp_group"),
        (megatron_loss_head, None, "must be a dict, not NoneType"),
        (megatron_logprobs_head, TARGETS["targets"], "must be a dict, not Tensor"),
    ],
)
def test_a_heads_context_that_lacks_something_is_refused(head: Any, context: Any, message: str) -> None:
    whole = layer()
    whole.tp_group = dist.group.WORLD
    # Parameters that are being gathered are waited for here.
    whole.register_forward_pre_hook(lambda *_: pytest.fail("the weight was asked for first"))
    with pytest.raises(ValueError, match=f"^output_processor_context {message}"), NoCollective():
        head(
            hidden_states=torch.zeros(T, 2, H),
            output_layer=whole,
            output_weight=None,
            config=SimpleNamespace(calculate_per_token_loss=True, grad_scale_func=None),
            context=context,
        )


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", [*OF_HIDDEN, *OF_LOGITS, *HEADS, "policy_loss"])
def test_a_group_without_this_rank_is_refused(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    for argument in ("tp_group", "cp_group"):
        if (argument == "tp_group" and name == "policy_loss") or (argument == "cp_group" and name not in LOSSES):
            continue
        other = dist.new_group([1])
        with pytest.raises(ValueError, match=f"{argument}: this rank is not a member of the group"), NoCollective():
            function(**inputs | {argument: other})


@pytest.mark.usefixtures("world")
def test_sequence_parallel_shapes_are_named_with_the_ranks() -> None:
    """Two ranks of two rows each: targets must have four."""
    for name in OF_HIDDEN:
        function, inputs = FUNCTIONS[name]
        options = {"tp_group": dist.group.WORLD, "sequence_parallel": True}
        message = r"targets has shape .2, 4., expected .4, 4. \(hidden's, its first dimension times 2 ranks of tp_group"
        with pytest.raises(ValueError, match=message), NoCollective():
            function(**inputs | options)
        with pytest.raises(ValueError, match="sequence_parallel=True needs a tp_group of more than one rank"):
            function(**inputs | options | {"tp_group": dist.new_group([0])})
    for name in HEADS:
        function, inputs = FUNCTIONS[name]
        options = {"tp_group": dist.group.WORLD, "output_layer": layer(sequence_parallel=True)}
        with pytest.raises(ValueError, match=r"targets has shape .2, 4., expected .2, 8. .*hidden"), NoCollective():
            function(**inputs | options)
