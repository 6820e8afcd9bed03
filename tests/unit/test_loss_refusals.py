"""Invalid input of the loss library: a ValueError that names the argument, before any collective."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss import (
    fused_linear_logprobs,
    fused_linear_policy_loss,
    megatron_logprobs_head,
    megatron_loss_func,
    megatron_loss_head,
    policy_loss,
    vocab_parallel_logprobs,
)

T, H, V = 4, 3, 6
X = torch.zeros
ONES, IDS = torch.ones(2, T), torch.zeros(2, T).long()
PER_TOKEN = {
    "old_logprobs": -ONES,
    "advantages": ONES,
    "loss_mask": ONES,
    "ref_logprobs": -ONES,
    "rollout_logprobs": -ONES,
    "sequence_ids": IDS,
}
LOGITS = {"logits": X(2, T, V), "targets": IDS, "tp_group": None}
HIDDEN = {"hidden": X(2, T, H), "weight": X(V, H), "targets": IDS}
DEFAULT = {"config": PolicyLossConfig()}


def layer(**changes: Any) -> Any:
    layer: Any = torch.nn.Linear(H, V, bias=False)
    layer.sequence_parallel, layer.tp_group = False, None
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def loss_head(
    output_layer: Any = None, output_weight: Any = None, model: Any = None, tp_group: Any = None, **context: Any
) -> Any:
    """Call a head as GPTModel does: hidden states [sequence, batch, H], everything else [batch, sequence]."""
    settings = {"calculate_per_token_loss": True, "grad_scale_func": None} | (model or {})
    hidden = context.pop("hidden", X(T, 2, H))
    head = megatron_loss_head if "advantages" in context else megatron_logprobs_head
    output_layer = output_layer or layer()
    output_layer.tp_group = tp_group
    return head(
        hidden_states=hidden,
        output_layer=output_layer,
        output_weight=output_weight,
        config=SimpleNamespace(**settings),
        context=context,
    )


FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "fused_linear_policy_loss": (fused_linear_policy_loss, HIDDEN | PER_TOKEN | DEFAULT),
    "fused_linear_logprobs": (fused_linear_logprobs, HIDDEN | {"loss_mask": ONES}),
    "policy_loss": (policy_loss, {"logprobs": -ONES, "entropy": ONES} | PER_TOKEN | DEFAULT),
    "vocab_parallel_logprobs": (vocab_parallel_logprobs, LOGITS | {"loss_mask": ONES}),
    "megatron_loss_func": (megatron_loss_func, LOGITS | PER_TOKEN | DEFAULT),
    "megatron_loss_head": (loss_head, {"targets": IDS} | PER_TOKEN | DEFAULT),
    "megatron_logprobs_head": (loss_head, {"targets": IDS, "loss_mask": ONES}),
}
LOSSES = ("fused_linear_policy_loss", "policy_loss", "megatron_loss_func", "megatron_loss_head")
FUSED = ("fused_linear_policy_loss", "fused_linear_logprobs", "megatron_loss_head", "megatron_logprobs_head")
OF_HIDDEN = ("fused_linear_policy_loss", "fused_linear_logprobs")
OF_LOGITS = ("vocab_parallel_logprobs", "megatron_loss_func")
HEADS = ("megatron_loss_head", "megatron_logprobs_head")
TAKE_IDS = (*FUSED, *OF_LOGITS)
OVER_TWO_RANKS = (*FUSED, "vocab_parallel_logprobs")
"""Functions that the test calls on two tensor-parallel ranks."""

Case = tuple[tuple[str, ...], dict[str, Any], str]


def each(functions: tuple[str, ...], name: str, message: str, *values: Any) -> list[Case]:
    """A case for each invalid value of one argument; the error starts with the argument's name."""
    return [(functions, {name: value}, f"^{name}.*{message}") for value in values]


def needs(name: str, functions: tuple[str, ...] = LOSSES, **settings: Any) -> list[Case]:
    """A case for each setting that requires a missing tensor."""
    return [
        (functions, {name: None, "config": PolicyLossConfig(**{setting: value})}, f"^{name} is missing.*{setting}")
        for setting, value in settings.items()
    ]


CASES: list[Case] = [
    # Shapes.
    *each(OF_HIDDEN, "hidden", "must be .*, not 1-d", X(H)),
    (OF_HIDDEN, {"hidden": X(2, T, H + 1)}, r"^weight must be .V/tp, 4. .*, not .6, 3."),
    (OF_HIDDEN, {"hidden": X(T, H)}, r"^targets has shape .2, 4., expected .4. .*hidden"),
    (HEADS, {"hidden": X(T + 1, 2, H)}, r"^targets has shape .2, 4., expected .2, 5. .*hidden"),
    (HEADS, {"output_layer": layer(sequence_parallel=True)}, r"^targets has shape .2, 4., expected .2, 8. .*hidden"),
    (OF_HIDDEN, {"sequence_parallel": True}, r"^targets has shape .2, 4., expected .4, 4. .*2 ranks of tp_group"),
    (OF_HIDDEN, {"sequence_parallel": True, "tp_group": None}, "^sequence_parallel=True needs a tp_group"),
    *each(OF_HIDDEN, "weight", "must be", X(H), X(H, V), X(1, V, H)),
    (HEADS, {"output_weight": X(H, V)}, "^weight must be"),
    *each(("vocab_parallel_logprobs",), "logits", "must be .*, not a scalar", torch.tensor(0.0)),
    (OF_LOGITS, {"logits": X(2, T + 1, V)}, "^targets has shape"),
    *each(TAKE_IDS, "targets", "has shape", X(2, T + 1).long(), X(2 * T).long()),
    *each(("policy_loss",), "logprobs", "must be", torch.tensor(0.0), IDS),
    *each(("policy_loss",), "entropy", "has shape", X(2, T + 1)),
    *(
        (LOSSES, {name: X(*shape).to(v.dtype)}, f"^{name} has shape .{listed}., expected .2, 4.")
        for shape, listed in (((2, T + 1), "2, 5"), ((2,), "2"), ((2 * T,), "8"), ((T, 2), "4, 2"))
        for name, v in PER_TOKEN.items()
    ),
    *each((*FUSED, *OF_LOGITS), "loss_mask", "shape .2, 1., expected .2, 4.", X(2, 1)),
    # Types.
    *each(OF_HIDDEN, "hidden", "must be floating point", X(2, T, H).long(), X(2, T, H, dtype=torch.complex64)),
    *each(OF_HIDDEN, "weight", "must be floating point, not torch.int32", X(V, H).int()),
    *each(OF_HIDDEN, "weight", "is torch.bfloat16, hidden torch.float32", X(V, H).bfloat16()),
    (HEADS, {"hidden": X(T, 2, H).half()}, "^weight is torch.float32, hidden torch.float16"),
    *each(OF_LOGITS, "logits", "must be floating point", X(2, T, V).long()),
    *each(TAKE_IDS, "targets", "must be integers", X(2, T), X(2, T).bool()),
    *each(("policy_loss",), "entropy", "must be floating point", IDS),
    *(
        case
        for name in ("old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
        for case in each(LOSSES, name, "must be floating point, not torch.int64", IDS)
    ),
    *each(LOSSES, "sequence_ids", "must be integers", X(2, T), X(2, T).bool()),
    # Token ids and the vocabulary.
    *each(TAKE_IDS, "targets", "holds token id", *(torch.full((2, T), i) for i in (2 * V, -1, -100, 1 << 40))),
    (TAKE_IDS, {"targets": IDS + V - 1, "vocab_size": V - 1}, "^targets holds token id 5, .* .0, 5."),
    (OVER_TWO_RANKS, {"targets": IDS + 2 * V - 1, "vocab_size": 2 * V - 1}, "^targets holds token id 11, .* .0, 11."),
    *each(TAKE_IDS, "vocab_size", "does not fit", 2 * V + 1),
    *each(TAKE_IDS, "vocab_size", "must be an integer >= 1", 0, 0.5),
    # Numbers.
    *each(FUSED, "chunk_size", "must be an integer >= 1", 0, -1, 64.5),
    *each(TAKE_IDS, "temperature", "must be > 0", 0, 0.0, -1.0, math.nan, math.inf),
    *each(("fused_linear_policy_loss",), "loss_scale", "must be > 0", 0.0, -2.0, math.nan),
    # Missing tensors.
    *each(LOSSES, "advantages", "must be a tensor", None),
    *each(("fused_linear_policy_loss", "policy_loss"), "loss_mask", "must be a tensor", None),
    *each(TAKE_IDS, "targets", "must be a tensor", None),
    *needs("entropy", ("policy_loss",), entropy_coef=0.1, entropy_quantile=0.5),
    *needs("ref_logprobs", kl_coef=0.1),
    *needs("rollout_logprobs", rollout_correction="mask", rollout_veto=0.1),
    *needs("old_logprobs", rollout_correction="mask", rollout_veto=0.1),
    (LOSSES, {"config": PolicyLossConfig(aggregation="seq-mean-token-sum-norm")}, "^norm_length is missing"),
    # Positions.
    *each(TAKE_IDS, "positions", "must be int64 indices", X(2), X(2).int(), X(1, 2).long(), torch.arange(9)),
    *each(FUSED, "positions", "must be a tensor", [0]),
    # The model.
    (HEADS, {"output_layer": layer(bias=torch.nn.Parameter(X(V)))}, "bias of the output layer"),
    (HEADS, {"model": {"use_mup": True}}, "muP"),
    (("megatron_loss_head",), {"model": {"calculate_per_token_loss": False}}, "needs calculate_per_token_loss=True"),
]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """Rank 0 of two, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class NoCollective(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace not in ("c10d", "_c10d_functional"), func
        return func(*args, **(kwargs or {}))


def groups(name: str) -> dict[str, Any]:
    """Each of two ranks holds 6 tokens, or some of a response's."""
    found: dict[str, Any] = {"tp_group": dist.group.WORLD} if name in OVER_TWO_RANKS else {}
    return found | ({"cp_group": dist.group.WORLD} if name in LOSSES else {})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_input_that_is_made_wrong_below_is_right(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    function(**inputs | groups(name))
    if name in OVER_TWO_RANKS:
        with pytest.raises(AssertionError, match="c10d"), NoCollective():
            function(**inputs | groups(name))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        pytest.param(name, changes, message, id=f"{name}-{message}")
        for names, changes, message in CASES
        for name in names
    ],
)
def test_wrong_input_is_refused_before_any_collective(name: str, changes: dict[str, Any], message: str) -> None:
    function, inputs = FUNCTIONS[name]
    with pytest.raises(ValueError, match=message), NoCollective():
        function(**inputs | groups(name) | changes)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("argument", ["tp_group", "cp_group"])
def test_a_group_without_this_rank_is_refused(name: str, argument: str) -> None:
    function, inputs = FUNCTIONS[name]
    if name in (LOSSES if argument == "cp_group" else TAKE_IDS):
        with pytest.raises(ValueError, match=f"{argument}: this rank is not a member of the group"), NoCollective():
            function(**inputs | {argument: dist.new_group([1])})


@pytest.mark.parametrize("name", ["megatron_loss_func", *HEADS])
def test_a_name_that_is_unknown_or_missing_is_named(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    with pytest.raises(TypeError, match="'advantage'"):
        function(**inputs | {"advantage": ONES})
    if name != "megatron_logprobs_head":
        with pytest.raises(TypeError, match="'old_logprobs'"), NoCollective():
            function(**{key: value for key, value in inputs.items() if key != "old_logprobs"})
