"""Mistakes on the command line and in files: one line that names the cause and a fix, exit code 2, no traceback."""

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_aspo import cli, launch
from megatron_aspo.errors import RunError

COMMANDS = ("train", "eval", "export", "check-rollout", "plan", "report", "metrics", "doctor")

DATA = Path(__file__).parents[1] / "data"

GOOD = "name: t\nmodel: {num_layers: 2}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sound run.yaml, and no way to start ranks should a mistake go unnoticed."""

    def started(module: str, arguments: list[str], ranks: int, hint: str) -> int:
        raise AssertionError(f"started {ranks} ranks of {module} with {arguments}")

    monkeypatch.setattr(launch, "run_local", started)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(GOOD)
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `megatron-aspo argv` complains of."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"megatron-aspo: [^\n]+\n", err), err
    assert "Traceback" not in err
    return err.removeprefix("megatron-aspo: ").rstrip("\n")


def test_the_guard_works() -> None:
    with pytest.raises(AssertionError, match=r"started 1 ranks of megatron_aspo\.train with \['run\.yaml'\]"):
        cli.main(["train", "run.yaml"])


@pytest.mark.parametrize(
    ("override", "names", "fix"),
    [
        # spelling
        ("rollout.tempreture=1", "rollout.tempreture", "did you mean rollout.temperature?"),
        ("optimiser.lr=1", "optimiser", "did you mean optimizer?"),
        ("lr=1", "unknown setting lr", "known here: name, output_dir, seed, model"),
        ("model.rms=1", "model.rms", "known here: hf_path, num_layers"),
        ("loss.objective=gprpo", "loss: objective='gprpo'", "did you mean grpo?"),
        ("loss.objective=mine", "loss: objective='mine'", "nor an import path module:name"),
        ("loss.objective=a.b:c-d", "loss: objective='a.b:c-d'", "nor an import path module:name"),
        ("loss.aggregation=token_mean", "loss.aggregation='token_mean'", "did you mean token-mean?"),
        ("model.dtype=fp16", "model.dtype='fp16'", "float32, bfloat16"),
        ("loss.kl_estimator=k4", "loss.kl_estimator='k4'", "k1, k2, k3"),
        # types
        ("seed=1.5", "seed=1.5", "a whole number"),
        ("seed=", "seed=None", "a whole number"),
        ("train.steps=ten", "train.steps='ten'", "a whole number"),
        ("train.epochs=true", "train.epochs=True", "a whole number"),
        ("train.packing=1", "train.packing=1", "true or false"),
        ("optimizer.lr=fast", "optimizer.lr='fast'", "a number"),
        ("optimizer.lr=true", "optimizer.lr=True", "a number"),
        ("optimizer.lr=nan", "optimizer.lr=nan", "a finite number"),
        ("name=null", "name=None", "a text"),
        ("rollout.stop=x", "rollout.stop='x'", "a list of strings"),
        ("rollout.stop=[1]", "rollout.stop=[1]", "a list of strings"),
        ("data.task_args=3", "data.task_args=3", "a mapping"),
        ("loss=3", "loss=3", "a section"),
        ("model.num_layers.x=3", "model.num_layers={'x': 3}", "a whole number"),
        # ranges
        ("seed=-1", "seed=-1", "[0, 2^31)"),
        ("name=a/b", "name='a/b'", "a folder's name"),
        ("name=..", "name='..'", "a folder's name"),
        ("parallel.tensor=0", "parallel: tensor=0", "> 0"),
        ("parallel.context=0", "parallel: context=0", "> 0"),
        ("parallel.expert=0", "parallel: expert=0", "> 0"),
        ("model.num_experts=-1", "model: num_experts=-1", ">= 0"),
        ("model.num_experts=1", "model: moe_top_k=2", "[1, num_experts=1]"),
        ("model.moe_ffn_hidden_size=0", "model: moe_ffn_hidden_size", "> 0"),
        ("model.moe_aux_loss_coef=-1", "model: moe_aux_loss_coef", ">= 0"),
        ("loss.clip_low=1", "loss: clip_low=1.0", "[0, 1)"),
        ("loss.clip_high=-0.1", "loss: clip_high=-0.1", ">= 0"),
        ("loss.dual_clip=1", "loss: dual_clip=1.0", "null to turn it off"),
        ("loss.entropy_quantile=1.5", "loss: entropy_quantile=1.5", "[0, 1]"),
        ("loss.kl_coef=-1", "loss: kl_coef=-1.0", ">= 0"),
        ("loss.norm_length=0", "loss: norm_length", "> 0"),
        ("rollout.temperature=0", "rollout: temperature=0.0", "> 0"),
        ("rollout.top_p=0", "rollout: top_p=0.0", "(0, 1]"),
        ("rollout.engine=vlm", "rollout: engine='vlm'", "did you mean vllm?"),
        ("rollout.engine=no_such:Engine", "cannot import no_such:Engine", "its folder in PYTHONPATH?"),
        ("rollout.engine=json:loads", "json:loads(", "must take (policy, config, tokenizer, seed)"),
        ("rollout.top_k=5", "rollout: top_k=5 is for vLLM", "set rollout.engine=vllm"),
        ("rollout.tensor=2", "rollout: tensor=2 is for vLLM", "set rollout.engine=vllm"),
        ("rollout.ranks=2", "rollout: ranks=2 is for vLLM", "set rollout.engine=vllm"),
        ("rollout.ranks=-1", "rollout: ranks=-1", ">= 0"),
        ("rollout={engine: vllm, ranks: 3, tensor: 2}", "rollout: ranks=3", "make it a multiple"),
        ("rollout={engine: vllm, max_staleness: 1}", "rollout: max_staleness=1 needs ranks", "set rollout.ranks"),
        ("rollout.max_staleness=-1", "rollout: max_staleness=-1", ">= 0"),
        ("rollout.refit_bucket_mb=0", "rollout: refit_bucket_mb=0", "> 0"),
        ("rollout.sleep_level=3", "rollout: sleep_level=3", "0, 1 or 2"),
        ("rollout.responses_per_prompt=1", "rollout: responses_per_prompt=1", ">= 2"),
        ("rollout.stop=['']", "rollout: stop", "empty string"),
        ("train.steps=-1", "train: steps=-1", ">= 0"),
        ("optimizer.lr=0", "optimizer: lr=0.0", "> 0"),
        ("optimizer.adam_beta2=1", "optimizer: adam_beta1 and adam_beta2", "[0, 1)"),
        ("warmup.wrong_fraction=1", "warmup: wrong_fraction=1.0", "[0, 1)"),
        ("eval.every=-1", "eval: every", ">= 0"),
        ("checkpoint.keep=-1", "checkpoint: every and keep", ">= 0"),
        ("checkpoint.stop_signals=[USR1]", "checkpoint: stop_signals: USR1 is no signal", "did you mean SIGUSR1?"),
        ("checkpoint.stop_signals=[SIGKILL]", "checkpoint: stop_signals: SIGKILL is no signal that can be caught", ""),
        ("data.prompt_template=hello", "data: prompt_template", "such as {prompt}"),
        # contradictions
        ("data.eval_seed=0", "data: seed and eval_seed", "must differ"),
        ("model.hidden_size=66", "model: hidden_size=66", "multiple of num_attention_heads=4"),
        ("model.hidden_size=60", "model: hidden_size / num_attention_heads = 15", "even"),
        ("model.num_query_groups=3", "model: num_attention_heads=4", "multiple of num_query_groups=3"),
        ("parallel.sequence_parallel=true", "parallel: sequence_parallel=true", "parallel.sequence_parallel=false"),
        ("parallel.tensor=3", "model.num_attention_heads=4", "parallel.tensor=3; change one"),
        ("parallel.pipeline=3", "model.num_layers=2", "parallel.pipeline=3; change one"),
        ("parallel.expert=2", "parallel.expert=2, but the model has no experts", "or take a model with experts"),
        ("train.mini_batch_prompts=64", "train.mini_batch_prompts=64", "lower the first or raise the second"),
        ("rollout.max_response_tokens=128", "rollout.max_response_tokens=128", "lower the first or raise the second"),
        ("train.max_tokens_per_micro_batch=64", "train.max_tokens_per_micro_batch=64", "raise it"),
        # the override itself
        ("seed", "override 'seed'", "section.field=value"),
        ("=1", "override '=1'", "section.field=value"),
        ("", "override ''", "section.field=value"),
        ("data.task_args={a: 1", "cannot read run.yaml", "fix the YAML or the override"),
        ("seed=${sed}", "'sed' not found", "fix the YAML or the override"),
        ("seed=${oc.env:NO_SUCH_VARIABLE}", "'NO_SUCH_VARIABLE' not found", "fix the YAML or the override"),
    ],
)
def test_settings(capsys: pytest.CaptureFixture[str], override: str, names: str, fix: str) -> None:
    message = complaint(capsys, "train", "run.yaml", override)
    assert names in message
    assert fix in message[message.index(names) :]


@pytest.mark.parametrize("command", ["train", "eval", "check-rollout"])
def test_vllm_of_another_version(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for version in ("0.31.9", "0.33.0rc1", "unknown"):
        site = folder / version
        (site / f"vllm-{version}.dist-info").mkdir(parents=True)
        (site / f"vllm-{version}.dist-info" / "METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(site)
        message = complaint(capsys, command, "run.yaml", "rollout.engine=vllm")
        assert f"rollout.engine=vllm was written for vllm >= 0.32 and < 0.33, and {version} is installed" in message
        assert message.endswith("install one of these, or set rollout.engine=megatron")


def test_without_vllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import omegaconf  # noqa: F401  (what reads the configuration is installed where vLLM is)

    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    message = complaint(capsys, "train", "run.yaml", "rollout.engine=vllm")
    assert message == (
        "rollout.engine=vllm needs vLLM, which is not installed; in a checkout make install brings its build for CPUs, "
        "pip install vllm==0.32.0 the one for GPUs; or set rollout.engine=megatron"
    )


@pytest.mark.parametrize(
    "command", ["train run.yaml", "eval run.yaml", "export run.yaml out", "check-rollout run.yaml"]
)
def test_without_hugging_face_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    import omegaconf  # noqa: F401  (what reads the configuration is there)

    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    for module in ("transformers", "safetensors", "hydra", "einops", "megatron", "megatron.bridge"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    Path("run.yaml").write_text("name: t\nmodel: {hf_path: Qwen/Qwen2.5-0.5B}\n")
    lock = (Path(__file__).parents[2] / "requirements.txt").read_text(encoding="utf-8")
    pins = {name: f"{name}=={version}" for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE)}
    names = " ".join(pins[name] for name in ("transformers", "safetensors", "hydra-core", "einops"))
    assert complaint(capsys, *command.split()) == (
        "model.hf_path needs transformers, safetensors, hydra, einops, megatron.bridge, not installed; run make "
        f"install in a checkout, or pip install {names} && pip install --no-deps {pins['megatron-bridge']}"
    )


def test_without_dependencies(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "omegaconf", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    for argv in (["train", "run.yaml"], ["plan", "run.yaml"], ["report", "runs/t"], ["doctor"]):
        message = complaint(capsys, *argv)
        assert message.startswith(
            "the command line needs the package's dependencies, which are not installed; install "
        )


def test_a_padded_sample_must_fit(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("model.max_sequence_length=33", "train.max_tokens_per_micro_batch=33")
    layout = ("parallel.tensor=2", "parallel.sequence_parallel=true")
    message = complaint(capsys, "train", "run.yaml", *lengths, *layout)
    assert "train.max_tokens_per_micro_batch=33 is less than 34" in message
    message = complaint(capsys, "train", "run.yaml", *lengths, *layout, "parallel.context=3")
    assert "train.max_tokens_per_micro_batch=33 is less than 36" in message


@pytest.mark.parametrize(
    ("content", "names", "fix"),
    [
        ("", "name is missing", "add a line 'name: my-run'"),
        ("seed: 1\n", "name is missing", "add a line 'name: my-run'"),
        ("- name\n- t\n", "cannot read run.yaml", "fix the YAML"),
        ("3\n", "cannot read run.yaml", "fix the YAML"),
        ("just words\n", "unknown setting just words", "known here: name"),
        ("name: [t\n", "line 1", "fix the YAML"),
        ("name: t\n\tseed: 1\n", "line 2", "fix the YAML"),
        ("name: t\nname: u\n", "duplicate key name", "fix the YAML"),
        ("name: t\n---\nname: u\n", "another document", "fix the YAML"),
        ("name: t\nseed: !!python/object:os.system {}\n", "python/object", "fix the YAML"),
        ("name: t\nseed: *there\n", "undefined alias 'there'", "fix the YAML"),
        ("name: &a [*a]\n", "recursion", "fix the YAML"),
        ("name: t\n? [a, b]\n: 1\n", "unhashable key", "fix the YAML"),
        ("name: t\nnull: 1\n", "key type 'NoneType'", "fix the YAML"),
        ("name: t\n7: 1\n", "unknown setting 7", "known here: name"),
        ("name: t\nloss:\n", "loss=None", "a section with fields"),
        ("name: t\nloss: [1]\n", "loss=[1]", "a section with fields"),
        ("name: t\nmodel: {num_layer: 3}\n", "model.num_layer;", "did you mean model.num_layers?"),
        ("name: t\nseed: 2020-01-01\n", "seed='2020-01-01'", "a whole number"),
        (b"\xff\xfename", "cannot read run.yaml", "fix the YAML"),
        (b"name: \x00", "cannot read run.yaml", "fix the YAML"),
    ],
)
def test_files(capsys: pytest.CaptureFixture[str], folder: Path, content: str | bytes, names: str, fix: str) -> None:
    (folder / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = complaint(capsys, "train", "run.yaml")
    assert names in message
    assert fix in message[message.index(names) :]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", f"the following arguments are required: {' | '.join(COMMANDS)}; see megatron-aspo --help"),
        ("trian run.yaml", f"invalid choice: 'trian' (choose from {str(COMMANDS)[1:-1]}); see megatron-aspo --help"),
        ("train", "arguments are required: config"),
        ("eval", "see megatron-aspo eval --help"),
        ("report", "arguments are required: RUN; see megatron-aspo report --help"),
        ("metrics", "arguments are required: RUN; see megatron-aspo metrics --help"),
        ("train nothing.yaml", "no configuration file at nothing.yaml; see examples/"),
        ("train .", "no configuration file at .; see examples/"),
        ("train run.yaml/x", "no configuration file at run.yaml/x; see examples/"),
        (f"train {'x' * 300}", "xxx; see examples/"),
        ("train run.yaml --nproc", "--nproc: expected one argument; see megatron-aspo train --help"),
        ("train run.yaml --nproc two", "--nproc: invalid int value: 'two'"),
        ("train run.yaml --nproc 0", "--nproc=0 must be >= 1"),
        ("train run.yaml --nproc=-2", "--nproc=-2 must be >= 1"),
        (
            "train run.yaml parallel.tensor=2 --nproc 3",
            "3 rank(s) cannot hold parallel.tensor=2 x parallel.pipeline=1 x parallel.context=1 "
            "with parallel.expert=1; start a multiple of 2 ranks",
        ),
        ("eval run.yaml parallel.pipeline=2 --nproc 1", "start a multiple of 2 ranks"),
        ("train run.yaml parallel.tensor=2 parallel.context=2 --nproc 2", "start a multiple of 4 ranks"),
        ("train run.yaml parallel.expert=4 model.num_experts=4 --nproc 2", "start a multiple of 4 ranks"),
        (
            "train run.yaml rollout.engine=vllm rollout.tensor=2 --nproc 3",
            "3 rank(s) cannot be parted into replicas of rollout.tensor=2 ranks; start a multiple of them",
        ),
        (
            "train run.yaml rollout.engine=vllm rollout.ranks=2 parallel.tensor=2 --nproc 2",
            "2 rank(s) are too few for rollout.ranks=2 that only generate and 2 that train; start 2 ranks more than a "
            "multiple of 2",
        ),
        (
            "train run.yaml rollout.engine=vllm rollout.ranks=2 parallel.tensor=2 --nproc 5",
            "3 training rank(s) (5 less rollout.ranks=2) cannot hold parallel.tensor=2 x parallel.pipeline=1 x "
            "parallel.context=1 with parallel.expert=1; start 2 ranks more than a multiple of 2",
        ),
        ("train run.yaml rollout.engine=vllm model.num_experts=4", "from model.hf_path only; name one, or"),
        ("train run.yaml parallel.expert=2 model.num_experts=3", "model.num_experts=3 cannot be spread over"),
        (
            "train run.yaml parallel.tensor=2 model.num_experts=4",
            "parallel.tensor=2 with model.num_experts=4 needs sequence parallelism",
        ),
        ("train run.yaml parallel.tensor=2 model.moe_ffn_hidden_size=33", "change one of them"),
        ("train run.yaml --resume", "--resume: expected one argument; see megatron-aspo train --help"),
        ("train run.yaml --steps 3", "unrecognized arguments: --steps"),
        ("train run.yaml --checkpoint x", "unrecognized arguments: --checkpoint"),
        ("train run.yaml output_dir=run.yaml", "output_dir: cannot make the folder run.yaml/t: Not a directory"),
        ("train run.yaml warmup.cache_dir=run.yaml/c", "warmup.cache_dir: cannot make the folder run.yaml/c"),
        (
            "train run.yaml data.path=run.jsonl",
            "no file at data.path=run.jsonl; give a .parquet, .jsonl, .json file, a pattern, or a folder (from /",
        ),
        (f"train run.yaml data.path={DATA} data.eval_path=no.json", "no file at data.eval_path=no.json; give a "),
        ("train run.yaml data.path=run.yaml", "data.path: run.yaml is not a .parquet, .jsonl, .json file; convert it"),
        ("train run.yaml --resume nowhere", "nowhere is not a complete checkpoint; give the path of a step_... folder"),
        ("eval run.yaml --checkpoint nowhere", "nowhere is not a complete checkpoint"),
        ("eval run.yaml", "no checkpoint under runs/t/checkpoints; train first, or give --checkpoint"),
        ("eval run.yaml --benchmark aime42=x", "--benchmark aime42=x: there is no aime42; did you mean aime2"),
        (
            "eval run.yaml --benchmark aime24=x.parquet",
            "no file at aime24=x.parquet; give a .parquet, .jsonl, .json file",
        ),
        (
            "eval run.yaml --benchmark reasoning_gym:gcd --samples 4 --pass-k 8",
            "--pass-k 8 must lie in [1, 4], the samp",
        ),
        ("eval run.yaml --benchmark reasoning_gym:gcd --preset r2", "--preset: invalid choice: 'r2' (choose from "),
        ("eval run.yaml --samples 4", "--samples is for benchmarks; name one with --benchmark"),
        ("eval run.yaml --benchmark reasoning_gym:gcd", "no checkpoint under runs/t/checkpoints; train first, or give"),
        ("train run.yaml --res auto", "unrecognized arguments: --res"),
        ("report nothing", "nothing has no metrics.jsonl; give the folder of a run, such as runs/<name>"),
        ("report run.yaml", "run.yaml has no metrics.jsonl; give the folder of a run, such as runs/<name>"),
        ("report .", ". has no metrics.jsonl; give the folder of a run, such as runs/<name>"),
        ("report . --out", "--out: expected one argument; see megatron-aspo report --help"),
        ("report . --to x", "unrecognized arguments: --to"),
        ("train run.yaml train.log_samples=-1", "train: log_samples=-1 must be >= 0"),
    ],
)
def test_arguments(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    assert message in complaint(capsys, *argv.split())


def test_report_before_the_first_step(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")
    assert complaint(capsys, "report", ".") == ". has no train step yet; wait for its first one to end"


@pytest.mark.parametrize(("rank", "local_rank", "lines"), [(0, 0, 1), (1, 1, 0), (8, 0, 1)])
def test_the_first_rank_of_a_host_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, lines: int
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert cli.main(["train", "nothing.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == lines


@pytest.mark.parametrize(("hint", "end"), [(cli.HINTS["train"], f"; {cli.HINTS['train']}"), ("", "")])
def test_a_run_that_cannot_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, hint: str, end: str
) -> None:
    def run() -> int:
        raise RunError("vLLM failed:\n  a reason")

    monkeypatch.setenv("RANK", "3")
    assert cli.exit_code(run, hint) == 1
    assert capsys.readouterr().err == f"megatron-aspo: rank 3: vLLM failed: a reason{end}\n"


@pytest.mark.parametrize(
    ("module", "stage", "hint"),
    [("megatron_aspo.train", "run", "train"), ("megatron_aspo.evaluation.__main__", "run_held_out", "eval")],
)
def test_a_rank_says_how_its_command_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, stage: str, hint: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RunError("the disk is gone")

    command = importlib.import_module(module)
    monkeypatch.setattr(command, stage, fail)
    monkeypatch.setattr(command, "find_weights", lambda *_: None, raising=False)  # of an evaluation
    assert command.main(["run.yaml"]) == 1
    assert capsys.readouterr().err.endswith(f"megatron-aspo: the disk is gone; {cli.HINTS[hint]}\n")


def test_good_arguments_reach_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str], int]] = []

    def run_local(module: str, arguments: list[str], ranks: int, hint: str) -> int:
        assert hint == cli.HINTS["train" if module == "megatron_aspo.train" else "eval"]
        calls.append((module, arguments, ranks))
        return 5

    monkeypatch.setattr(launch, "run_local", run_local)
    assert cli.main(["train", "run.yaml", "parallel.tensor=2", "seed=3", "--resume", "auto"]) == 5
    assert cli.main(["train", "run.yaml", "--resume", "auto", "--nproc", "2", "parallel.tensor=2", "seed=4"]) == 5
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "meta.json").write_text('{"step": 3, "model": {}}')
    assert cli.main(["eval", "run.yaml", "--nproc", "2", "--checkpoint", "c"]) == 5
    benchmark = ["--benchmark", "reasoning_gym:gcd", "--samples", "4"]
    assert cli.main(["eval", "run.yaml", *benchmark, "--checkpoint", "base", "--nproc", "2"]) == 5
    apart = ["parallel.tensor=2", "rollout.engine=vllm", "rollout.ranks=1"]
    assert cli.main(["train", "run.yaml", *apart, "--resume", "auto"]) == 5
    assert cli.main(["eval", "run.yaml", *apart, "--checkpoint", "c"]) == 5  # which has no use for such ranks
    assert calls.pop(4) == ("megatron_aspo.train", ["run.yaml", *apart, "--resume", "auto"], 3)
    assert calls.pop(4) == ("megatron_aspo.evaluation", ["run.yaml", *apart, "--checkpoint", "c"], 2)
    assert calls == [
        ("megatron_aspo.train", ["run.yaml", "parallel.tensor=2", "seed=3", "--resume", "auto"], 2),
        ("megatron_aspo.train", ["run.yaml", "parallel.tensor=2", "seed=4", "--resume", "auto"], 2),
        ("megatron_aspo.evaluation", ["run.yaml", "--checkpoint", "c"], 2),
        ("megatron_aspo.evaluation", ["run.yaml", "--checkpoint", "base", *benchmark], 2),
    ]


def test_resume_is_an_override() -> None:
    parser = argparse.ArgumentParser()
    cli.add_run_arguments(parser)
    for argv, resume in (
        (["run.yaml"], "never"),
        (["run.yaml", "--resume", "auto"], "auto"),
        (["run.yaml", "checkpoint.resume=never", "--resume", "a/step_000001"], "a/step_000001"),
    ):
        assert cli.parse_run_config(parser.parse_args(argv)).checkpoint.resume == resume


# --- As a user starts it ---

PROGRAM = Path(sys.executable).with_name("megatron-aspo")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            f"megatron-aspo: the following arguments are required: {' | '.join(COMMANDS)}; see megatron-aspo --help\n",
        ),
        (["train", "no.yaml"], "megatron-aspo: no configuration file at no.yaml; see examples/ for ones that run\n"),
        (
            ["train", "run.yaml", "train.step=1"],
            "megatron-aspo: unknown setting train.step; did you mean train.steps?\n",
        ),
        (["eval", "run.yaml", "seed=x"], "megatron-aspo: seed='x' should be a whole number\n"),
        (
            ["report", "."],
            "megatron-aspo: . has no metrics.jsonl; give the folder of a run, such as runs/<name>\n",
        ),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_the_installed_program(folder: Path, argv: list[str], message: str) -> None:
    done = subprocess.run([PROGRAM, *argv], cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["eval", "--help"], ["report", "--help"]], ids=str)
def test_help_is_light(argv: list[str]) -> None:
    heavy = {"torch", "megatron", "numpy", "omegaconf", "matplotlib", "rich", "reasoning_gym"}
    code = f"""
import sys
from megatron_aspo.cli import main
try:
    main({argv!r})
except SystemExit as done:
    print(done.code, sorted({heavy!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(f"usage: megatron-aspo {' '.join(argv[:-1])}".rstrip())
    assert done.stdout.endswith("\n0 []\n")
