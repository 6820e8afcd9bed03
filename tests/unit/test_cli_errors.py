"""Mistakes on the command line and in files: one line that names the cause and a fix, exit code 2, no traceback."""

import argparse
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_aspo import __main__, cli
from megatron_aspo.config.load import load_config
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.ranks import launch
from megatron_aspo.rewards.reasoning_gym import import_reasoning_gym
from megatron_aspo.rollout.environments import open_environment

COMMANDS = ("train", "eval", "export", "check-rollout", "plan", "report", "doctor", "gpu-check")

DATA = Path(__file__).parents[1] / "data"

GOOD = "name: t\nmodel: {num_layers: 2}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a valid run.yaml; starting ranks raises, in case a mistake goes undetected."""

    def started(module: str, arguments: list[str], ranks: int, *_: object) -> int:
        raise AssertionError(f"started {ranks} ranks of {module} with {arguments}")

    monkeypatch.setattr(launch, "run_local", started)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(GOOD)
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Error message of `megatron-aspo argv`."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"megatron-aspo: [^\n]+\n", err), err
    assert "Traceback" not in err
    return err.removeprefix("megatron-aspo: ").rstrip("\n")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("rollout.tempreture=1", "did you mean rollout.temperature?"),
        ("optimiser.lr=1", "did you mean optimizer?"),
        ("loss.objective=apso", "did you mean aspo?"),
        ("lr=1", "known here: name, output_dir, seed, model"),
        ("model.rms=1", "known here: hf_path, num_layers"),
        ("data.sources=[{task: a, wait: 1}]", "did you mean data.sources.0.weight?"),
        ("loss.objective=gprpo", "did you mean grpo?"),
        ("data.chat_template_args={enable_thinking: false}", "needs chat_template=true"),
        ("loss.aggregation=token_mean", "did you mean token-mean?"),
        ("rollout.engine=vlm", "did you mean vllm?"),
        ("rollout.advantage=reinforce", "did you mean reinforce++?"),
    ],
)
def test_spelling(capsys: pytest.CaptureFixture[str], override: str, hint: str) -> None:
    assert hint in complaint(capsys, "train", "run.yaml", override)


@pytest.mark.parametrize("command", ["eval", "export", "check-rollout"])
def test_only_training_resumes(capsys: pytest.CaptureFixture[str], command: str) -> None:
    folder = ["exported"] if command == "export" else []
    message = complaint(capsys, command, "run.yaml", *folder, "checkpoint.resume=runs/other/checkpoints/step_000005")
    assert message.endswith("is for training; choose the checkpoint by --checkpoint")


@pytest.mark.parametrize(
    "override",
    [
        *("loss.objective=mine", "loss.objective=a.b:c-d", "model.dtype=fp16", "loss.kl_estimator=k4"),
        # types
        *("seed=1.5", "seed=", "train.steps=ten", "train.epochs=true", "train.packing=1", "optimizer.lr=fast"),
        *("optimizer.lr=true", "optimizer.lr=nan", "name=null", "name=true", "rollout.stop=x", "data.task_args=3"),
        *("loss=3", "loss.clip_low=true", "model.num_layers='3'", "cluster=3", "data.sources=3"),
        # ranges
        *("seed=-1", "seed=2147483648", "data.seed=1073741824", "name=a/b", "name=..", "parallel.tensor=0"),
        *("parallel.context=0", "parallel.expert=0", "parallel={tensor: 2, expert_tensor: 3}", "model.num_experts=-1"),
        *("model.moe_ffn_hidden_size=0", "model.moe_aux_loss_coef=-1", "loss.clip_low=1", "loss.clip_high=-0.1"),
        *("loss.dual_clip=1", "loss.entropy_quantile=1.5", "loss.kl_coef=-1", "loss.norm_length=0", "eval.every=-1"),
        *("rollout.temperature=0", "rollout.top_p=0", "rollout.top_p=1.1", "rollout.ranks=-1", "rollout.sleep_level=3"),
        *("rollout.max_staleness=-1", "rollout.refit_bucket_mb=0", "rollout.responses_per_prompt=1", "train.steps=-1"),
        *("rollout.stop=['']", "optimizer.lr=0", "optimizer.adam_beta2=1", "optimizer.cpu_offload=1.1"),
        *("warmup.wrong_fraction=1", "checkpoint.keep=-1", "data.weight=0"),
        *("data.prompt_template=hello", "reward.max_unjudged=2", "reward.code.memory_mib=63"),
        *("reward.code={test_seconds: 2, total_seconds: 1}", "cluster.gpu=v100", "train.recompute_modules=[attention]"),
        # contradictions
        *("data.eval_seed=0", "model.hidden_size=66", "model.hidden_size=60", "parallel.sequence_parallel=true"),
        *("parallel.expert=2", "train.mini_batch_prompts=64", "rollout.max_response_tokens=128", "rollout.top_k=5"),
        *("train.max_tokens_per_micro_batch=64", "rollout.tensor=2", "rollout.ranks=2", "data.eval_path=x"),
        *("optimizer={cpu_offload: 1, moments_dtype: bfloat16}", "data.columns={x: y}"),
        *("parallel.virtual_pipeline=2", "parallel.overlap_param_gather=true", "parallel.moe_dispatcher=flex"),
    ],
)
def test_values_that_are_refused(capsys: pytest.CaptureFixture[str], override: str) -> None:
    message = complaint(capsys, "train", "run.yaml", override)
    assert [name for name in override.partition("=")[0].split(".") if name not in message] == []


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("loss.dual_clip=x", "loss.dual_clip='x' "),
        ("model.num_layers.x=3", "model.num_layers={'x': 3} "),
        ("data.columns.prompt=", "data.columns.prompt=None "),
        ("data.curriculum=[{task_args: {}}]", "data.curriculum.0.after is missing"),
        ("data={path: a.json, reward: maths}", "data.reward='maths'"),
        ("model.num_experts=1", "model.moe_top_k=2 must not exceed num_experts=1"),
        ("model.num_query_groups=3", "model.num_attention_heads=4"),
        ("parallel.tensor=3", "model.num_attention_heads=4"),
        ("parallel.pipeline=3", "model.num_layers=2"),
        ("parallel={pipeline: 2, virtual_pipeline: 2}", "stage of 1 of model.num_layers=2 cannot be cut into"),
        ("parallel={tensor: 2, moe_dispatcher: flex}", "moe_dispatcher=flex needs a model with experts"),
        ("rollout={engine: vllm, ranks: 3, tensor: 2}", "rollout.ranks=3"),
        ("rollout={max_staleness: 1, oversample: 1.5}", "rollout.max_staleness=1 and oversample=1.5 together need"),
        ("rollout={engine: vllm, max_staleness: 1, in_flight: true}", "rollout.in_flight=true needs ranks"),
        ("rollout={engine: m:Engine, oversample: 1.5}", "rollout.oversample=1.5 needs an engine"),
        ("rollout.max_age=3", "rollout.max_age=3 is for unfinished responses; set oversample"),
        ("rollout.engine=no_such:Engine", "cannot import no_such:Engine"),
        ("rollout.engine=json:loads", "json:loads("),
        ("seed", "override 'seed' is not of the form section.field=value"),
        ("=1", "override '=1'"),
        ("data.task_args={a: 1", "cannot read run.yaml"),
        ("seed=${sed}", "'sed' not found"),
    ],
)
def test_settings(capsys: pytest.CaptureFixture[str], override: str, names: str) -> None:
    assert names in complaint(capsys, "train", "run.yaml", override)


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
        assert message.startswith("rollout.engine=vllm")
        assert f"{version} is installed" in message


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
    message = complaint(capsys, *command.split())
    assert message.startswith("model.hf_path needs transformers, safetensors, hydra, einops, megatron.bridge, not inst")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    itself, *others = (f"'{requirement}'" for requirement in project["optional-dependencies"]["hf"])
    assert itself == "'megatron-aspo[train]'"
    assert [requirement for requirement in others if requirement not in message] == []


def test_without_dependencies(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "omegaconf", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    assert __main__.main() == 2
    message = r"megatron-aspo: the command line needs omegaconf.*; pip install 'megatron-aspo\[train\]'.*\n"
    assert re.fullmatch(message, capsys.readouterr().err)


def test_maximum_likelihood_advantages_take_no_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(capsys, "train", "run.yaml", "rollout.advantage=maxrl", "reward.overlong_buffer=4")
    assert message.startswith("rollout.advantage=maxrl needs rewards >= 0; set reward.overlong_buffer=0")


NO_SANDBOX = "the sandbox of reward.code cannot run a program here (the sandbox failed: nice: "


@pytest.fixture
def without_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("nice", "ldd"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    open_environment.cache_clear()


@pytest.mark.usefixtures("without_bubblewrap")
@pytest.mark.parametrize("command", ["train", "eval", "check-rollout"])
def test_the_python_tool_without_a_sandbox(capsys: pytest.CaptureFixture[str], command: str) -> None:
    message = complaint(capsys, command, "run.yaml", "rollout.environment=python")
    assert message.startswith(NO_SANDBOX)
    assert "bwrap" in message
    assert "bubblewrap (apt-get install bubblewrap)" in message


@pytest.mark.usefixtures("without_bubblewrap")
def test_a_program_without_a_sandbox_builds_no_model(folder: Path) -> None:
    """The ranks of a program that calls `run` have not passed through the command line."""
    from megatron_aspo.train import train

    with pytest.raises(UserError, match=re.escape(NO_SANDBOX)):
        train(load_config(folder / "run.yaml", ["rollout.environment=python"]), ())
    assert not (folder / "runs").exists()


def test_reasoning_gym_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"^cannot import reasoning_gym: .*; pip install 'megatron-aspo\[train\]'"):
        import_reasoning_gym()


def test_a_padded_sample_must_fit(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("model.max_sequence_length=33", "train.max_tokens_per_micro_batch=33")
    layout = ("parallel.tensor=2", "parallel.sequence_parallel=true")
    message = complaint(capsys, "train", "run.yaml", *lengths, *layout)
    assert "train.max_tokens_per_micro_batch=33 is less than 34" in message
    message = complaint(capsys, "train", "run.yaml", *lengths, *layout, "parallel.context=3")
    assert "train.max_tokens_per_micro_batch=33 is less than 36" in message


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("", "name is missing; add a line 'name: my-run'"),
        ("- name\n- t\n", "cannot read run.yaml"),
        ("just words\n", "unknown setting just words"),
        ("name: [t\n", "line 1"),
        ("name: t\n\tseed: 1\n", "line 2"),
        ("name: t\nname: u\n", "duplicate key name"),
        ("name: t\n---\nname: u\n", "another document"),
        ("name: t\nseed: !!python/object:os.system {}\n", "python/object"),
        ("name: t\nseed: *there\n", "undefined alias 'there'"),
        ("name: &a [*a]\n", "recursion"),
        ("name: t\n? [a, b]\n: 1\n", "unhashable key"),
        ("name: t\nnull: 1\n", "key type 'NoneType'"),
        ("name: t\nloss:\n", "loss=None"),
        ("name: t\nmodel: {num_layer: 3}\n", "did you mean model.num_layers?"),
        ("name: t\nseed: 2020-01-01\n", "seed='2020-01-01'"),
        (b"\xff\xfename", "cannot read run.yaml"),
        (b"name: \x00", "cannot read run.yaml"),
    ],
)
def test_files(capsys: pytest.CaptureFixture[str], folder: Path, content: str | bytes, names: str) -> None:
    (folder / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert names in complaint(capsys, "train", "run.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", f"the following arguments are required: {' | '.join(COMMANDS)}; see megatron-aspo --help"),
        ("trian run.yaml", f"invalid choice: 'trian' (choose from {str(COMMANDS)[1:-1]}); see megatron-aspo --help"),
        ("train", "arguments are required: config"),
        ("report", "arguments are required: RUN; see megatron-aspo report --help"),
        ("train nothing.yaml", "no configuration file at nothing.yaml; see examples/"),
        ("train run.yaml/x", "no configuration file at run.yaml/x; see examples/"),
        (f"train {'x' * 300}", "xxx; see examples/"),
        ("train run.yaml --nproc two", "--nproc: invalid int value: 'two'"),
        ("train run.yaml --nproc 0", "0 rank(s) cannot hold"),
        ("train run.yaml parallel.tensor=2 --nproc 3", "start a multiple of 2 ranks"),
        ("train run.yaml parallel.tensor=2 parallel.context=2 --nproc 2", "start a multiple of 4 ranks"),
        ("train run.yaml parallel.expert=4 model.num_experts=4 --nproc 2", "start a multiple of 4 ranks"),
        ("train run.yaml rollout.engine=vllm rollout.tensor=2 --nproc 3", "rollout.tensor=2 ranks"),
        ("train run.yaml rollout.engine=vllm rollout.ranks=2 parallel.tensor=2 --nproc 5", "start 2 ranks more than a"),
        ("train run.yaml rollout.engine=vllm model.num_experts=4", "model.hf_path"),
        ("train run.yaml parallel.expert=2 model.num_experts=3", "model.num_experts=3 "),
        ("train run.yaml train.router_replay=true model.num_experts=4", "should be 'none', 'trainer' or 'sampler'"),
        ("train run.yaml train.router_replay=sampler", "no experts; set train.router_replay=none"),
        ("train run.yaml train.router_replay=sampler model.num_experts=4", "needs rollout.engine=vllm"),
        ("train run.yaml train.router_replay=sampler model.num_experts=384", "set train.router_replay=trainer"),
        ("train run.yaml parallel.tensor=2 model.num_experts=4", "parallel.sequence_parallel=true"),
        ("train run.yaml parallel.tensor=2 model.moe_ffn_hidden_size=33", "model.moe_ffn_hidden_size=33 "),
        ("train run.yaml --steps 3", "unrecognized arguments: --steps"),
        ("train run.yaml --checkpoint x", "unrecognized arguments: --checkpoint"),
        ("train run.yaml output_dir=run.yaml", "output_dir: cannot make the folder run.yaml/t"),
        ("train run.yaml warmup.cache_dir=run.yaml/c", "warmup.cache_dir: cannot make the folder run.yaml/c"),
        ("train run.yaml data.path=run.jsonl", "no file at data.path=run.jsonl"),
        (f"train run.yaml data.path={DATA} data.eval_path=no.json", "no file at data.eval_path=no.json"),
        ("train run.yaml data.path=run.yaml", "data.path: run.yaml is not"),
        ("train run.yaml --resume nowhere", "nowhere is not a complete checkpoint"),
        ("eval run.yaml --checkpoint nowhere", "nowhere is not a complete checkpoint"),
        ("eval run.yaml", "no checkpoint under runs/t/checkpoints"),
        ("eval run.yaml --benchmark aime42=x", "--benchmark aime42=x: there is no aime42"),
        ("eval run.yaml --benchmark aime24=x.parquet", "no file at --benchmark aime24=x.parquet"),
        ("eval run.yaml --benchmark reasoning_gym:gcd --top-p 2", "--top-p 2.0"),
        ("eval run.yaml --samples 4", "--samples is for benchmarks"),
        (
            "eval run.yaml --benchmark reasoning_gym:gcd data.task=sokoban rollout.environment=sokoban",
            "rollout.environment=sokoban needs data.task=sokoban, not data.task=gcd; change one of them",
        ),
        ("eval run.yaml --benchmark reasoning_gym:gcd", "no checkpoint under runs/t/checkpoints"),
        ("train run.yaml --res auto", "unrecognized arguments: --res"),
        ("report .", ". has no metrics.jsonl; give the folder of a run, such as runs/<name>"),
    ],
)
def test_arguments(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    assert message in complaint(capsys, *argv.split())


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


def test_a_run_that_cannot_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> int:
        raise RunError("vLLM failed:\n  a reason")

    monkeypatch.setenv("RANK", "3")
    assert (cli.exit_code(run), cli.exit_code(run, "do it again")) == (1, 1)
    line = "megatron-aspo: rank 3: vLLM failed: a reason"
    assert capsys.readouterr().err == f"{line}\n{line}; do it again\n"


@pytest.mark.parametrize(
    ("module", "stage", "hint"),
    [("megatron_aspo.commands.train", "run", "train"), ("megatron_aspo.commands.evaluate", "run_held_out", "eval")],
)
def test_a_rank_says_how_its_command_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, stage: str, hint: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RunError("the disk is gone")

    command = importlib.import_module(module)
    monkeypatch.setattr(command, stage, fail)
    assert command.main(["run.yaml", *(["--checkpoint", "base"] if hint == "eval" else [])]) == 1
    assert capsys.readouterr().err.endswith(f"megatron-aspo: the disk is gone; {cli.HINTS[hint]}\n")


def test_good_arguments_reach_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str], int]] = []

    def run_local(module: str, arguments: list[str], ranks: int, hint: str, environment: dict[str, str]) -> int:
        assert hint == cli.HINTS["train" if module == "megatron_aspo.commands.train" else "eval"]
        calls.append((module, arguments, ranks))
        return 5

    monkeypatch.setattr(launch, "run_local", run_local)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "meta.json").write_text('{"step": 3, "model": {}}')
    apart = ["parallel.tensor=2", "rollout.engine=vllm", "rollout.ranks=1"]
    for command, module, words, ranks in (
        ("train", "train", ["run.yaml", "parallel.tensor=2", "seed=3", "--resume", "auto"], 2),
        ("train", "train", ["run.yaml", "--resume", "auto", "--nproc", "2", "seed=4"], 2),
        ("train", "train", ["run.yaml", *apart], 3),
        ("eval", "evaluate", ["run.yaml", "--benchmark", "reasoning_gym:gcd", "--checkpoint", "base"], 1),
        ("eval", "evaluate", ["run.yaml", *apart, "--checkpoint", "c"], 2),  # without ranks that only generate
    ):
        assert cli.main([command, *words]) == 5
        assert calls.pop() == (f"megatron_aspo.commands.{module}", words, ranks)


def test_resume_is_an_override() -> None:
    parser = argparse.ArgumentParser()
    cli.add_rank_arguments(parser, "train")
    for argv, resume in (
        (["run.yaml"], "never"),
        (["run.yaml", "--resume", "auto"], "auto"),
        (["run.yaml", "checkpoint.resume=never", "--resume", "a/step_000001"], "a/step_000001"),
    ):
        assert cli.parse_run_config(parser.parse_args(argv)).checkpoint.resume == resume


# --- Whole command lines, as a user starts them ---

PROGRAM = Path(sys.executable).with_name("megatron-aspo")


@pytest.mark.parametrize("argv", [[], ["train", "no.yaml"], ["eval", "run.yaml", "seed=x"], ["report", "."]], ids=str)
def test_the_installed_program(folder: Path, argv: list[str]) -> None:
    done = subprocess.run([PROGRAM, *argv], cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"megatron-aspo: [^\n]+\n", done.stderr)


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
