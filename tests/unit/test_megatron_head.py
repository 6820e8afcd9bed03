"""The fused head as GPTModel's output_processor, against the path through logits with tensors [batch, sequence]."""

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_aspo.config.loss import Aggregation, ObjectiveName, PolicyLossConfig
from megatron_aspo.loss import (
    LossOutput,
    megatron_forward,
    megatron_logprobs_head,
    megatron_loss_func,
    megatron_loss_head,
    megatron_loss_tuple,
    policy_loss,
    vocab_parallel_logprobs,
)

B, S, H, V = 3, 5, 4, 11
OPTIONS: dict[str, Any] = {"temperature": 0.8, "vocab_size": V - 2}
CONFIGS = [
    *(PolicyLossConfig(objective=name) for name in get_args(ObjectiveName)),
    *(PolicyLossConfig(aggregation=name, norm_length=6) for name in get_args(Aggregation)),
    PolicyLossConfig(kl_coef=0.1, entropy_coef=0.1, entropy_quantile=0.5, rollout_sequence_high=1.1),
]


class Model:
    """Stands in for GPTModel around its output layer: hidden states [sequence, batch, H], and the call of the hook."""

    def __init__(self, scale: float | None = None, tied: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(S, B, H, generator=generator, dtype=torch.float64).requires_grad_()
        self.weight: Any = torch.nn.Parameter(torch.randn(V, H, generator=generator, dtype=torch.float64))
        other = torch.zeros_like(self.weight)
        self.layer: Any = torch.nn.Linear(1, 1, bias=False)
        self.layer.weight = torch.nn.Parameter(other) if tied else self.weight
        self.layer.sequence_parallel, self.layer.tp_group = False, None
        self.tied = tied
        self.config = SimpleNamespace(
            calculate_per_token_loss=True, grad_scale_func=None if scale is None else lambda loss: loss * scale
        )

    def __call__(self, output_processor: Any, output_processor_context: Any) -> Any:
        others = ("labels", "loss_mask", "input_ids", "position_ids", "attention_mask", "decoder_input", "scale_logits")
        others += ("inference_context", "packed_seq_params", "runtime_gather_output", "compute_language_model_loss")
        return output_processor(
            hidden_states=self.hidden,
            output_layer=self.layer,
            output_weight=self.weight if self.tied else None,
            context=output_processor_context,
            config=self.config,
            **dict.fromkeys(others),
        )

    def logits(self) -> Tensor:
        """Logits [batch, sequence, V], as GPTModel returns them."""
        return (self.hidden @ self.weight.T).transpose(0, 1)


def make_batch() -> dict[str, Any]:
    """Inputs [batch, sequence]; the last row has no token."""
    generator = torch.Generator().manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(B, S, generator=generator, dtype=torch.float64)

    mask = torch.rand(B, S, generator=generator) < 0.8
    mask[-1] = False
    old = -2 + normal() / 2
    return {
        "targets": torch.randint(V - 2, (B, S), generator=generator).masked_fill(~mask, -100),
        "old_logprobs": old,
        "advantages": normal(),
        "loss_mask": mask,
        "ref_logprobs": old + normal() / 3,
        "rollout_logprobs": old + normal() / 3,
    }


def expected(model: Model, batch: dict[str, Any], config: PolicyLossConfig, **options: Any) -> LossOutput:
    rest = {name: values for name, values in batch.items() if name != "targets"}
    logprobs, entropy = vocab_parallel_logprobs(
        model.logits(), batch["targets"], None, loss_mask=batch["loss_mask"], **OPTIONS
    )
    return policy_loss(logprobs, entropy=entropy, config=config, **rest, **options)


def values(metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    return {name: pytest.approx([x.item() for x in pair], rel=1e-9) for name, pair in metrics.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.objective}-{c.aggregation}-{c.kl_coef}")
def test_the_head_is_the_path_through_logits(config: PolicyLossConfig, tied: bool) -> None:
    batch = make_batch()
    one, other = Model(tied=tied), Model()
    out = one(megatron_loss_head, batch | {"config": config, "chunk_size": 4} | OPTIONS)
    right = expected(other, batch, config)
    assert out.loss_sum.item() == pytest.approx(right.loss_sum.item(), rel=1e-11)
    assert out.denominator.item() == right.denominator.item()
    assert out.logprobs.shape == (B, S)
    torch.testing.assert_close(out.logprobs, right.logprobs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out.entropy, right.entropy, rtol=1e-11, atol=1e-12)
    assert {name: [x.item() for x in pair] for name, pair in out.metrics.items()} == values(right.metrics)
    assert {name: x.item() for name, x in out.maxima.items()} == pytest.approx(
        {name: x.item() for name, x in right.maxima.items()}
    )
    for result in (out, right):
        result.loss_sum.backward()
    torch.testing.assert_close(one.hidden.grad, other.hidden.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one.weight.grad, other.weight.grad, rtol=1e-10, atol=1e-12)


def test_the_tuple_is_the_closures() -> None:
    config, batch = PolicyLossConfig(objective="gspo", aggregation="seq-mean-token-mean"), make_batch()
    found = megatron_loss_tuple(Model()(megatron_loss_head, batch | {"config": config, **OPTIONS}))
    right = megatron_loss_func(Model().logits(), **batch, config=config, tp_group=None, **OPTIONS)
    assert found[0].item() == pytest.approx(right[0].item(), rel=1e-11)
    assert found[0].requires_grad
    assert (found[1].item(), found[1].dtype) == (2, torch.int32)
    assert set(found[2]) == {"metrics", "maxima"}
    assert {n: [x.item() for x in pair] for n, pair in found[2]["metrics"].items()} == values(right[2]["metrics"])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.objective}-{c.aggregation}-{c.kl_coef}")
def test_rows_are_responses_unless_ids_say_otherwise(config: PolicyLossConfig) -> None:
    batch = make_batch()
    rows = torch.arange(B)[:, None].expand(B, S)
    context = batch | {"config": config, **OPTIONS}
    default = Model()(megatron_loss_head, context)
    named = Model()(megatron_loss_head, context | {"sequence_ids": rows})
    assert default.loss_sum.item() == named.loss_sum.item()
    assert default.denominator.item() == named.denominator.item()
    assert "sequence_ids" not in context  # the caller's tensors are not modified

    ids = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 0], [3, 3, 3, 3, 3]])
    packed = Model()(megatron_loss_head, context | {"sequence_ids": ids})
    right = expected(Model(), batch, config, sequence_ids=ids)
    assert packed.loss_sum.item() == pytest.approx(right.loss_sum.item(), rel=1e-11)
    assert packed.denominator.item() == right.denominator.item()
    if config.aggregation == "seq-mean-token-mean":
        assert (default.denominator.item(), packed.denominator.item()) == (2, 3)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.objective}-{c.aggregation}-{c.kl_coef}")
def test_positions_are_those_of_the_flattened_batch(config: PolicyLossConfig) -> None:
    batch = make_batch()
    context = batch | {"config": config, "chunk_size": 4} | OPTIONS
    positions = batch["loss_mask"].flatten().nonzero()[:, 0]
    plain, model = Model(), Model()
    right, out = plain(megatron_loss_head, context), model(megatron_loss_head, context | {"positions": positions})
    for result in (right, out):
        result.loss_sum.backward()
    assert out.loss_sum.item() == right.loss_sum.item()
    assert torch.equal(out.logprobs, right.logprobs)
    assert torch.equal(model.hidden.grad, plain.hidden.grad)  # type: ignore[arg-type]
    assert torch.equal(model.weight.grad, plain.weight.grad)
    by_logits = megatron_loss_func(
        Model().logits(), **batch, positions=positions, config=config, tp_group=None, **OPTIONS
    )
    assert by_logits[0].item() == pytest.approx(right.loss_sum.item(), rel=1e-11)
    context = {"targets": batch["targets"], **OPTIONS}
    found, _ = Model()(megatron_logprobs_head, context | {"loss_mask": batch["loss_mask"], "positions": positions})
    assert torch.equal(found, right.logprobs)


def test_a_packed_stream_is_one_row() -> None:
    """THD: hidden states [tokens, 1, H], everything else [1, tokens]."""
    config, batch = PolicyLossConfig(aggregation="seq-mean-token-sum"), make_batch()
    model = Model()
    right = model(megatron_loss_head, batch | {"config": config})
    stream = {name: values.reshape(1, B * S) for name, values in batch.items()}
    stream["sequence_ids"] = torch.arange(B).repeat_interleave(S)[None]
    model.hidden = model.hidden.transpose(0, 1).reshape(B * S, 1, H)
    out = model(megatron_loss_head, stream | {"config": config})
    assert out.loss_sum.item() == pytest.approx(right.loss_sum.item(), rel=1e-12)
    assert out.denominator.item() == right.denominator.item() == 2
    torch.testing.assert_close(out.logprobs.view(B, S), right.logprobs)


@pytest.mark.parametrize("scale", [None, 1.0, 1024.0])
def test_main_grad_gets_the_scale_that_the_schedule_multiplies_by(scale: float | None) -> None:
    config, batch = PolicyLossConfig(), make_batch()
    plain, model = Model(), Model(scale)
    plain(megatron_loss_head, batch | {"config": config}).loss_sum.backward()
    model.weight.main_grad = torch.ones_like(model.weight)
    model.weight.grad_added_to_main_grad = False
    out = model(megatron_loss_head, batch | {"config": config})
    torch.testing.assert_close(model.weight.main_grad - 1, (scale or 1) * plain.weight.grad)
    # as the schedule does
    loss = megatron_loss_tuple(out)[0]
    (loss if model.config.grad_scale_func is None else model.config.grad_scale_func(loss)).backward()
    assert model.weight.grad_added_to_main_grad
    assert plain.hidden.grad is not None
    torch.testing.assert_close(model.hidden.grad, (scale or 1) * plain.hidden.grad)


@pytest.mark.parametrize("tied", [False, True])
def test_logprobs_alone(tied: bool) -> None:
    batch = make_batch()
    context = {"targets": batch["targets"], "loss_mask": batch["loss_mask"], "chunk_size": 4} | OPTIONS
    found, entropy = Model(tied=tied)(megatron_logprobs_head, context)
    right = expected(Model(), batch, PolicyLossConfig())
    assert found.shape == entropy.shape == (B, S)
    assert not found.requires_grad
    torch.testing.assert_close(found, right.logprobs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(entropy, right.entropy, rtol=1e-11, atol=1e-12)
    # These log-probs serve as the old policy's: the ratio is 1.
    out = Model()(megatron_loss_head, batch | {"old_logprobs": found, "config": PolicyLossConfig(), **OPTIONS})
    assert out.maxima["log_ratio_max"].item() < 1e-14


class OldModel(torch.nn.Module):
    """Stands in for the GPTModel of Megatron-Core before 0.18, around its real output layer. Its forward pass has no
    `output_processor`."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.post_process, self.config = True, SimpleNamespace(calculate_per_token_loss=True, **config)
        self.output_layer: Any = torch.nn.Linear(H, V)

    def forward(self, labels: Any = None) -> Tensor:
        return self.output_layer(torch.ones(S, B, H))[0]


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (torch.nn.Linear(H, V), {}, "megatron_forward needs a GPTModel and no labels; the model is a Linear"),
        (
            OldModel(),
            {"labels": torch.ones(B, S)},
            "megatron_forward needs a GPTModel and no labels; the model is a Old",
        ),
        (OldModel(mtp_num_layers=1), {}, "does not support multi-token prediction"),
        (OldModel(), {}, "'old_logprobs'|'targets'"),  # the head's own error
    ],
)
def test_models_without_the_hook_are_refused_by_name(model: Any, given: dict[str, Any], message: str) -> None:
    wrapped: Any = torch.nn.Module()
    wrapped.module, wrapped.forward = model, model.forward
    for layer in model.modules():
        layer.tp_group, layer.sequence_parallel = None, False
    with pytest.raises((ValueError, TypeError), match=message):
        megatron_forward(wrapped, head=megatron_loss_head, context={}, **given)
    assert not [layer for layer in model.modules() if "forward" in vars(layer)]  # nothing stays behind


class NewModel(OldModel):
    """A GPTModel of Megatron-Core 0.18 and later."""

    def forward(self, labels: Any = None, output_processor: Any = None, output_processor_context: Any = None) -> Tensor:
        return torch.ones(B, S)


def test_a_model_with_the_hook_takes_no_labels_on_its_last_stage() -> None:
    model = NewModel()
    with pytest.raises(ValueError, match="no labels"):
        megatron_forward(model, labels=torch.ones(B, S), head=megatron_loss_head, context={})
    model.post_process = False
    assert megatron_forward(model, labels=torch.ones(B, S), head=megatron_loss_head, context={}).shape == (B, S)


def test_labels_by_position_are_refused_and_a_replaced_forward_stays() -> None:
    model = OldModel()
    replaced = model.output_layer.forward = model.output_layer.forward  # as other libraries do
    with pytest.raises(ValueError, match="no labels"):
        megatron_forward(model, torch.ones(B, S), head=megatron_loss_head, context={})
    with pytest.raises((ValueError, TypeError)):
        megatron_forward(model, head=megatron_loss_head, context={})
    assert vars(model.output_layer)["forward"] is replaced
