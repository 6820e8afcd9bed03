"""Hugging Face weights: bit-exact round trips in every layout, equal log-probs, and one-line errors for mistakes."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from ranks import assign, everywhere, make_samples, run, run_config
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, VOCAB, change_published, write_model, write_published, write_tokenizer
from torch import Tensor

from megatron_aspo import cli
from megatron_aspo.batch import MicroBatch, Prompt
from megatron_aspo.commands import export
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer, HuggingFaceTokenizer, read_hf_config
from megatron_aspo.errors import UserError
from megatron_aspo.loss import PolicyLossConfig
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.megatron import EmbeddedEngine
from megatron_aspo.train import set_logprobs

pytestmark = [pytest.mark.engines, pytest.mark.distributed]

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
EXPERTS = {
    **{"qwen3-moe": 1e-5, "qwen3-next": 1e-5, "qwen3.5-moe": 2e-5},
    **{"deepseek-v3": 1e-4, "glm4-moe": 1e-5, "glm4-moe-lite": 1e-4, "kimi-k2": 1e-4},
}
"""Name -> largest difference of a log-prob to transformers."""
DENSE = [name for name in MODELS if name not in EXPERTS]
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "tp2-pp2": ParallelConfig(tensor=2, pipeline=2),
    "tp2-sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "tp2-pp2-sp": ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True),
}
EXPERT_LAYOUTS = {
    "ep2": ParallelConfig(expert=2),
    "ep2-tp2": ParallelConfig(expert=2, tensor=2, sequence_parallel=True),
    "ep2-tp2-etp1": ParallelConfig(expert=2, tensor=2, expert_tensor=1, sequence_parallel=True),
    "ep2-pp2": ParallelConfig(expert=2, pipeline=2),
    "ep2-tp2-pp2": ParallelConfig(expert=2, tensor=2, pipeline=2, sequence_parallel=True),
}


def config_of(folder: Path, parallel: ParallelConfig, **settings: Any) -> RunConfig:
    return run_config(parallel, model=ModelConfig(hf_path=str(folder), **{"max_sequence_length": 64, **settings}))


@contextlib.contextmanager
def policy_of(config: RunConfig, vocab_size: int = VOCAB) -> Iterator[Policy]:
    """Build a policy and release its groups afterwards, so that a world can build several in turn."""
    try:
        yield Policy(config, vocab_size)
    finally:
        parallel_state.destroy_model_parallel()


def weights_of(policy: Policy) -> dict[str, Tensor]:
    from megatron_aspo.policy.hf.weights import export_weights

    exported = export_weights(policy.config.model, policy.whole_chunks(), policy.vocab_size)
    return {name: tensor.clone() for name, tensor in exported}


def difference(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that only one side has, or that are not bitwise equal."""
    same = {name for name in weights.keys() & expected.keys() if torch.equal(weights[name], expected[name])}
    return sorted((weights.keys() | expected.keys()) - same)


@torch.no_grad()
def logprob_error(folder: Path, batches: list[MicroBatch]) -> float:
    """max |log-prob by Megatron − by transformers| over the responses of packed streams."""
    from transformers import AutoModelForCausalLM

    settings: Any = {"config": read_hf_config(str(folder)), "dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    worst = 0.0
    for batch in batches:
        assert batch.old_logprobs is not None
        bounds = batch.cu_seqlens.tolist()
        for start, end in itertools.pairwise(bounds):
            mask = batch.loss_mask[start:end].bool()
            if mask.any():
                logits = model(batch.tokens[None, start:end]).logits[0].float()
                expected = logits.log_softmax(-1).gather(1, batch.labels[start:end, None])[:, 0]
                worst = max(worst, float((expected - batch.old_logprobs[start:end])[mask].abs().max()))
    return worst


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in DeepSeek's published format, and in `meant` the weights that it encodes."""
    folder = tmp_path_factory.mktemp("published")
    write_published(folder / "fp8", folder / "meant")
    write_tokenizer(folder / "fp8")
    return folder / "fp8"


def there_and_back(
    folders: list[Path], parallel: ParallelConfig, vocab_size: int = VOCAB, dtype: str = "float32"
) -> list[tuple[list[str], float]]:
    """For each folder: the tensors that a round trip changed, and the error of the log-probs on this rank."""
    results: list[tuple[list[str], float]] = []
    config = config_of(folders[0], parallel, dtype=dtype)
    with distributed(config):
        for folder in folders:
            with policy_of(config_of(folder, parallel, dtype=dtype), vocab_size) as policy:
                batches = policy.pack(make_samples())
                set_logprobs(policy, [batches])
                plain = folder.with_name("meant") if folder.name == "fp8" else folder
                stored = load_file(plain / "model.safetensors")
                expected = {name: tensor.to(policy.model.config.params_dtype) for name, tensor in stored.items()}
                error = logprob_error(plain, batches) if policy.is_last_stage else 0.0
                results.append((difference(weights_of(policy), expected), error))
    return results


def held(layout: str) -> list[str]:
    """Dense models that a layout can hold. Gated delta nets are split with sequence parallelism only, other models are
    read alike with it."""
    parallel = LAYOUTS[layout]
    if layout == "tp2-pp2-sp":
        return ["qwen3.5"]
    return [name for name in DENSE if name != "qwen3.5" or parallel.tensor == 1 or parallel.sequence_parallel]


@functools.cache
def dense_results(tiny: Path, layout: str) -> list[list[tuple[list[str], float]]]:
    parallel = LAYOUTS[layout]
    return run(parallel.model_parallel_size, there_and_back, [tiny / name for name in held(layout)], parallel)


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for layout in LAYOUTS for name in held(layout)])
def test_there_and_back(name: str, layout: str, tiny: Path) -> None:
    for rank in dense_results(tiny, layout):
        different, error = rank[held(layout).index(name)]
        assert different == []
        assert error <= 1e-5


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_there_and_back_with_experts(layout: str, tiny: Path, published: Path) -> None:
    parallel = EXPERT_LAYOUTS[layout]
    folders = [tiny / name for name in EXPERTS] + [published]
    for results in run(parallel.model_parallel_size, there_and_back, folders, parallel):
        for (different, error), tolerance in zip(results, (*EXPERTS.values(), 1e-4), strict=True):
            assert different == []
            assert error <= tolerance


def test_bfloat16_there_and_back(tiny: Path) -> None:
    for results in run(2, there_and_back, [tiny / "qwen3"], ParallelConfig(tensor=2), VOCAB, "bfloat16"):
        assert results[0][0] == []


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="make smollm2 fetches it")
@pytest.mark.parametrize("layout", ["tp1", "pp2"])
def test_smollm2(layout: str) -> None:
    parallel = LAYOUTS[layout]
    for ((different, error),) in run(parallel.model_parallel_size, there_and_back, [SMOLLM2], parallel, 49152):
        assert different == []
        assert error <= 2e-4


def update(policy: Policy) -> None:
    policy.train_step(policy.pack(make_samples()), PolicyLossConfig(), UpdateMetrics())


def gradients(folder: Path, parallel: ParallelConfig) -> dict[str, Tensor]:
    """Gradients of a whole update under Hugging Face's names, without data parallelism."""
    config = config_of(folder, parallel)
    with distributed(config), policy_of(config) as policy:
        update(policy)
        assign(policy, [parameter.main_grad for parameter in policy.model.parameters()])
        return weights_of(policy)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3", "qwen3.5"])
def test_the_gradients_do_not_depend_on_the_layout(name: str, tiny: Path) -> None:
    (expected,) = run(1, gradients, tiny / name, ParallelConfig())
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for layout in (layout for layout in ("tp2", "tp2-sp", "pp2") if name in held(layout)):
        for found in run(2, gradients, tiny / name, LAYOUTS[layout]):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda m, at=layout: f"{at}: {m}")


def sampled(folder: Path, parallel: ParallelConfig) -> tuple[list[Any], float]:
    """Sampled tokens, and max |log-prob by the sampler − by the trainer|."""
    config = config_of(folder, parallel)
    prompts = [Prompt(i, "", tuple(range(1, 4 + i)), {}) for i in range(6)]
    with distributed(config), policy_of(config) as policy:
        samples = EmbeddedEngine(policy, config.rollout, AsciiTokenizer(), seed=1).generate(prompts, 4, 1.0)
        batches = policy.pack(samples)
        set_logprobs(policy, [batches])
        error = 0.0
        for batch in batches if policy.is_last_stage else []:
            assert batch.old_logprobs is not None
            assert batch.rollout_logprobs is not None
            error = max(error, float(((batch.old_logprobs - batch.rollout_logprobs) * batch.loss_mask).abs().max()))
        return [sample.token_ids.tolist() for sample in everywhere(samples)], error


def test_padding_of_the_vocabulary_is_never_sampled_and_has_no_probability(tiny: Path) -> None:
    # The padding's logits are 0, a typical value here: unmasked they would take a share of the probability.
    ((expected, _),) = run(1, sampled, tiny / "llama", ParallelConfig())
    for tokens, error in run(2, sampled, tiny / "llama", ParallelConfig(tensor=2)):
        assert tokens == expected
        assert error <= 1e-5


UPDATE = OptimizerConfig(lr=1e-3, lr_warmup_updates=0)


def trained(folder: Path, parallel: ParallelConfig, runs: Path, resume: bool = False) -> dict[str, Tensor]:
    """Weights after three updates. With `resume` the first two come from the checkpoint of an earlier call."""
    config = replace(config_of(folder, parallel), optimizer=UPDATE)
    with distributed(config), policy_of(config) as policy:
        if resume:
            checkpoint.load(runs / "step_000002", policy)
        else:
            update(policy)
            update(policy)
            checkpoint.save(runs, 2, policy, {})
        update(policy)
        return weights_of(policy)


def test_a_checkpoint_is_resumed_where_the_vocabulary_is_padded_otherwise(tiny: Path, tmp_path: Path) -> None:
    layouts = (LAYOUTS["tp1"], LAYOUTS["tp2"])
    for one, other in (layouts, layouts[::-1]):
        runs = tmp_path / f"from{one.tensor}"
        expected = run(one.model_parallel_size, trained, tiny / "qwen3", one, runs)[0]
        for found in run(other.model_parallel_size, trained, tiny / "qwen3", other, runs, True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def loaded_from(checkpoint_folder: Path, folders: list[str]) -> list[str]:
    """For each value of model.hf_path the error of loading the checkpoint, "" if it succeeds."""
    found: list[str] = []
    with distributed(config_of(Path(folders[0]), ParallelConfig())):
        for folder in folders:
            config = run_config(model=ModelConfig(hf_path=folder, max_sequence_length=64))
            with policy_of(config) as policy:
                try:
                    checkpoint.load(checkpoint_folder, policy)
                    found.append("")
                except UserError as error:
                    found.append(str(error))
    return found


def test_a_model_may_move_between_checkpoint_and_resume(tmp_path: Path) -> None:
    source = write_model("llama", tmp_path / "here")
    run(1, trained, source, ParallelConfig(), tmp_path)
    moved = source.rename(tmp_path / "there")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to(moved / "model.safetensors")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    (other / "config.json").write_text(json.dumps(json.loads((moved / "config.json").read_text()) | rope))
    saved = tmp_path / "step_000002"
    same, slash, changed = run(1, loaded_from, saved, [str(moved), f"{moved}/", str(other)])[0]
    assert same == slash == ""
    assert "was written by another model: rope_parameters={" in changed
    assert "'rope_theta': 10000.0" in changed
    assert "'rope_theta': 500000.0" in changed


def refusals(folders: list[Path], parallel: ParallelConfig, settings: dict[str, Any]) -> list[str]:
    """The error of building a policy from each folder."""
    messages: list[str] = []
    with distributed(config_of(folders[0], parallel)):
        for folder in folders:
            with pytest.raises(UserError) as caught, policy_of(config_of(folder, parallel, **settings)):
                pass
            messages.append(str(caught.value))
    return messages


def changed_copy(source: Path, folder: Path, add: str = "", drop: str = "") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    if drop:
        del tensors[drop]
    save_file(tensors | ({add: torch.zeros(3)} if add else {}), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_missing_or_extra_tensor_is_named_on_every_rank(tiny: Path, tmp_path: Path) -> None:
    last, first = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    cases = {
        f"lacks the tensor(s) {last}": changed_copy(tiny / "llama", tmp_path / "a", drop=last),
        f"lacks the tensor(s) {first}": changed_copy(tiny / "llama", tmp_path / "b", drop=first),
        "lacks the tensor(s) lm_head.weight": changed_copy(tiny / "llama", tmp_path / "c", drop="lm_head.weight"),
        "has the tensor(s) model.layers.7.odd": changed_copy(tiny / "llama", tmp_path / "d", add="model.layers.7.odd"),
        "has the tensor(s) model.layers.0.self_attn.q_proj.bias": changed_copy(
            tiny / "qwen3", tmp_path / "e", add="model.layers.0.self_attn.q_proj.bias"
        ),
    }
    of_others = (
        "model.visual.odd",
        "model.language_model.norm.weight",
        "mtp.odd",
        "model.layers.0.mlp.experts.down_proj",
    )
    for name in of_others:  # a Llama has neither vision, nor a prefix, nor MTP, nor experts
        cases[f"has the tensor(s) {name}"] = changed_copy(tiny / "llama", tmp_path / name, add=name)
    for messages in run(2, refusals, list(cases.values()), ParallelConfig(pipeline=2), {}):
        for message, text in zip(messages, cases, strict=True):
            assert text in message
    lost = "model.layers.1.mlp.experts.3.down_proj.weight"  # only rank 1 holds it; rank 0 names it too
    folder = changed_copy(tiny / "qwen3-moe", tmp_path / "f", drop=lost)
    assert all(lost in m for (m,) in run(2, refusals, [folder], ParallelConfig(expert=2), {}))


def exported_and_read_again(folder: Path, exported: Path, parallel: ParallelConfig) -> dict[str, Tensor]:
    from megatron_aspo.policy.hf.weights import save_folder

    config = config_of(folder, parallel, dtype="bfloat16")
    with distributed(config):
        with policy_of(config) as policy:
            save_folder(exported, policy.config.model, policy.whole_chunks(), policy.vocab_size)
        with policy_of(config_of(exported, parallel, dtype="bfloat16")) as policy:
            return weights_of(policy)


def test_what_was_published_in_fp8_is_exported_in_the_dtype_of_the_model(published: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    exported, bias = tmp_path / "exported", "e_score_correction_bias"
    plain = load_file(published.with_name("meant") / "model.safetensors")
    expected = {name: tensor if bias in name else tensor.bfloat16() for name, tensor in plain.items()}
    for found in run(4, exported_and_read_again, published, exported, EXPERT_LAYOUTS["ep2-tp2"]):
        assert difference(found, expected) == []
    # Layer 2 predicts a further token. It is published as a copy of layer 1 with tensors of its own.
    written, mtp = load_file(exported / "model.safetensors"), "model.layers.2."
    assert difference({name: x for name, x in written.items() if not name.startswith(mtp)}, expected) == []
    further = {name.replace("layers.1.", "layers.2."): x for name, x in expected.items() if "layers.1." in name}
    for file in published.glob("*.safetensors"):
        own = {name: x for name, x in load_file(file).items() if name.startswith(mtp) and name not in further}
        further |= {name: x for name, x in own.items() if not name.endswith("_scale_inv")}
    assert difference({name: x for name, x in written.items() if name.startswith(mtp)}, further) == []
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (exported, published))
    assert (config["num_nextn_predict_layers"], config["dtype"]) == (1, "bfloat16")
    gone = {"quantization_config", "auto_map", "torch_dtype"}
    assert before.keys() - config.keys() == gone
    assert {name for name in config if config[name] != before.get(name)} == {"dtype"}
    loaded: Any = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    model, loading = loaded
    unexpected = loading.pop("unexpected_keys")  # transformers has no MTP
    assert all(name.startswith(mtp) for name in unexpected)
    assert not any(loading.values())
    assert HuggingFaceTokenizer(str(published)).vocab_size == HuggingFaceTokenizer(str(exported)).vocab_size == VOCAB
    assert model.dtype == torch.bfloat16
    assert model.config.num_nextn_predict_layers == 1


def test_fp8_without_what_it_needs_is_one_line(published: Path, tmp_path: Path) -> None:
    down, low = "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.0.self_attn.q_a_proj.weight"
    fp8 = load_file(published / "model-00001-of-00002.safetensors")
    awq = {"quant_method": "awq", "bits": 4}
    per_tensor = {"quant_method": "fp8", "activation_scheme": "static"}
    cases = {
        f"lacks the tensor(s) {down}_scale_inv, the scales": {f"{down}_scale_inv": None},
        f"{down} in FP8 has the shape (16, 24) and its scales (2, 2), not (1, 2)": {down: fp8[down][:16].clone()},
        f"{low} has the shape (15, 32), its config.json says (16, 32)": {low: fp8[low][:15].clone()},
        f"{low} in FP8 has the shape (512,) and its scales (1, 2)": {low: fp8[low].flatten()},
        f"has the tensor(s) {down}_scale_inv, for which": {down: fp8[down].bfloat16()},
        "quant_method=awq, weight_block_size=None; only fp8": {"config": {"quantization_config": awq}},
        "quant_method=fp8, weight_block_size=None; only fp8": {"config": {"quantization_config": per_tensor}},
        "in FP8, and its config.json has no quantization_config": {"config": {"quantization_config": None}},
        "has 44 tensors, among them model.layers.2.eh_proj.weight": {"config": {"num_nextn_predict_layers": 0}},
    }
    folders = [change_published(published, tmp_path / str(i), **case) for i, case in enumerate(cases.values())]
    for messages in run(2, refusals, folders, ParallelConfig(pipeline=2), {}):
        for message, text in zip(messages, cases, strict=True):
            assert text in message
            assert "\n" not in message


def test_what_cannot_be_read_or_computed_is_one_line(tiny: Path, tmp_path: Path) -> None:
    def other(name: str, **fields: Any) -> Path:
        return moved("llama", name, **fields)

    def moved(source: str, name: str, **fields: Any) -> Path:
        """A folder with a model's config.json and some fields changed."""
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((tiny / source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    broken = other("broken")
    (broken / "config.json").write_text("{")
    cut = changed_copy(tiny / "llama", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((tiny / "llama" / "model.safetensors").read_bytes()[:-100])
    wide = changed_copy(tiny / "llama", tmp_path / "wide")
    (wide / "config.json").write_text(json.dumps(json.loads((wide / "config.json").read_text()) | {"hidden_size": 48}))
    without_a_shard = changed_copy(tiny / "llama", tmp_path / "shards")
    (without_a_shard / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.norm.weight": "b.safetensors"}}'
    )
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    cases = {
        "cannot read model.hf_path=": tmp_path / "nowhere" / "at" / "all",
        f"cannot read model.hf_path={broken}": broken,
        "it has no *.safetensors": other("empty"),
        "not fully covered": cut,
        "No such file": without_a_shard,
        "model.embed_tokens.weight has the shape (131, 32), its config.json says (131, 48)": wide,
        "is a GPT2LMHeadModel, which is not supported": other("gpt2", architectures=["GPT2LMHeadModel"]),
        "rope_type=yarn": other("yarn", rope_parameters=yarn),
        "hidden_act=gelu": other("gelu", hidden_act="gelu"),
        "exceeds the 32 positions": other("short", max_position_embeddings=32),
        "a bias in its MLP": other("bias", mlp_bias=True),
        "sliding-window attention over 32 tokens": moved("mistral", "window", sliding_window=32),
        "norm_topk_prob=false": moved("qwen3-moe", "not_normed", norm_topk_prob=False),
        "such groups of experts": moved("glm4-moe", "groups", n_group=4, topk_group=2),
        "has tied embeddings, which is not supported": moved("glm4-moe", "tied", tie_word_embeddings=True),
    }
    (messages,) = run(1, refusals, list(cases.values()), ParallelConfig(), {})
    for message, text in zip(messages, cases, strict=True):
        assert text in message
        assert "\n" not in message
    three = write_model("llama", tmp_path / "three", num_attention_heads=3, num_key_value_heads=1, hidden_size=36)
    one_kv = write_model("llama", tmp_path / "one_kv", num_key_value_heads=1)
    for heads, groups in run(2, refusals, [three, one_kv], ParallelConfig(tensor=2), {}):
        assert "num_attention_heads=3 is not a multiple of parallel.tensor=2" in heads
        assert "num_query_groups=1 is not a multiple of parallel.tensor=2" in groups


def embedded_refusal(folder: Path) -> None:
    config = config_of(folder, ParallelConfig())
    with (
        distributed(config),
        policy_of(config) as policy,
        pytest.raises(UserError, match="does not sample with gated delta nets"),
    ):
        EmbeddedEngine(policy, config.rollout, AsciiTokenizer(), seed=1)


def test_gated_delta_nets_are_refused_where_they_have_not_been_tried(tiny: Path) -> None:
    run(1, embedded_refusal, tiny / "qwen3.5")
    for parallel, text in (
        (ParallelConfig(tensor=2), "which need sequence parallelism at parallel.tensor=2"),
        (ParallelConfig(context=2), "gated delta nets, not tried with context parallelism"),
    ):
        for (message,) in run(2, refusals, [tiny / "qwen3.5"], parallel, {}):
            assert text in message


def write_checkpoint(config: RunConfig) -> dict[str, Tensor]:
    """Save weights that differ from the initial ones as step 3."""
    with distributed(config), policy_of(config) as policy:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        checkpoint.save(config.run_dir / "checkpoints", 3, policy, {})
        return weights_of(policy)


def run_export(arguments: list[str], shard_bytes: int) -> tuple[int, str]:
    from megatron_aspo.policy.hf import weights as hf

    hf.MAX_SHARD_BYTES = shard_bytes
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        return export.main(arguments), stderr.getvalue()


def test_export_writes_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_model("qwen3", tmp_path / "source")
    write_tokenizer(source)
    config = replace(config_of(source, ParallelConfig(), dtype="bfloat16"), output_dir=str(tmp_path))
    (expected,) = run(1, write_checkpoint, config)
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"name: test\noutput_dir: {tmp_path}\nmodel: {{hf_path: {source}, dtype: bfloat16, max_sequence_length: 64}}\n"
        "parallel: {tensor: 2}\n"
    )
    for folder, shard_bytes, files in ((tmp_path / "one", 1 << 30, 1), (tmp_path / "many", 20_000, 3)):
        assert [code for code, _ in run(2, run_export, [str(yaml), str(folder)], shard_bytes)] == [0, 0]
        found = AutoModelForCausalLM.from_pretrained(folder)
        assert found.dtype == torch.bfloat16
        assert difference(dict(found.state_dict()), expected) == []
        assert len(list(folder.glob("*.safetensors"))) >= files
        assert AutoTokenizer.from_pretrained(folder).chat_template
        assert sorted(p.name for p in source.iterdir() if p.suffix == ".json") == sorted(
            p.name for p in folder.iterdir() if p.suffix == ".json" and "index" not in p.name
        )
    assert cli.main(["export", str(yaml), str(tmp_path / "one")]) == 2


def test_tokenizer(tmp_path: Path) -> None:
    write_model("llama", tmp_path)
    write_tokenizer(tmp_path)
    plain, chat = HuggingFaceTokenizer(str(tmp_path)), HuggingFaceTokenizer(str(tmp_path), chat_template=True)
    assert plain.vocab_size == VOCAB
    assert plain.eos_ids[0] == 129
    assert plain.encode("1+2") == tuple(b"1+2")
    assert chat.encode_prompt("1+2") == (128, 130, *b"1+2", ord(">"))
    assert chat.decode((*b"3", 129)) == "3"
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}")
    picky = HuggingFaceTokenizer(str(tmp_path), chat_template=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2"}]
    with pytest.raises(UserError, match="refuses messages of system, user: no system here; change the prompts"):
        picky.encode_prompt(messages)
    template.write_text("{{ messages[0]['content'] }}{% if thinking is defined and not thinking %}=0{% endif %}")
    for template_args, prompt in (({}, b"1+2"), ({"thinking": True}, b"1+2"), ({"thinking": False}, b"1+2=0")):
        assert HuggingFaceTokenizer(str(tmp_path), True, template_args).encode_prompt("1+2") == tuple(prompt)
    with pytest.raises(UserError, match="has no variable think; correct or remove it in data"):
        HuggingFaceTokenizer(str(tmp_path), True, {"think": False})
    template.unlink()
    with pytest.raises(UserError, match="no chat template"):
        HuggingFaceTokenizer(str(tmp_path), chat_template=True)
