"""NeMo-Run experiment for ASPO: the recipes in examples/, on this machine or by Slurm. README.md has the commands.

NeMo-Run starts the same ranks as `megatron-aspo train`, in the project's environment or container.
"""

import glob
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Optional

import nemo_run as run
from torchx.specs import AppState

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_aspo.commands.arguments import exit_code  # noqa: E402
from megatron_aspo.config.checks import check_world_size  # noqa: E402
from megatron_aspo.config.load import load_config  # noqa: E402
from megatron_aspo.config.run import RunConfig  # noqa: E402
from megatron_aspo.ranks.launch import rank_environment  # noqa: E402
from megatron_aspo.tools.planning.gpus import KNOWN  # noqa: E402

# Interpreter of the ranks outside containers. NeMo-Run has a separate environment.
PYTHON = os.environ.get("PYTHON", str(ROOT / ".venv/bin/python"))

# Script of every rank. A Slurm task is one rank; torchrun sets these variables itself.
RANK_SCRIPT = """\
set -e
export PYTHONUNBUFFERED=1 PYTHONHASHSEED=${{PYTHONHASHSEED:-0}}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}
{environment}
if [[ -z ${{RANK:-}} ]]; then
  trap "" USR1  # until python listens
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
  [[ $LOCAL_RANK != 0 ]] || {python} -m megatron_aspo.cli doctor
fi
exec {python} -m megatron_aspo.commands.train {words}
"""

# Part of the batch script before the ranks start. At the time limit the ranks save and exit with code 0. NeMo-Run
# requeues only failed jobs, so the trap requeues this one.
BATCH_SETUP = """\
export MASTER_ADDR=$(scontrol --oneliner show node "$head_node" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
rm -f {interrupted}
trap '[[ ! -f {interrupted} ]] || ((${{SLURM_RESTART_COUNT:-0}} >= 20)) || scontrol requeue "$SLURM_JOB_ID"' EXIT
"""


@run.cli.entrypoint(type="experiment")
def aspo(
    ctx: run.cli.RunContext,
    recipe: str,
    nodes: int = 1,
    ranks_per_node: int = 1,
    gpus_per_node: int = 0,
    settings: Optional[list[str]] = None,  # noqa: UP045  NeMo-Run reads no other spelling
):
    """Train by ASPO.

    Args:
        recipe: a YAML file of the repository, such as examples/qwen2_5_32b.yaml.
        nodes: number of machines.
        ranks_per_node: processes per machine.
        gpus_per_node: GPUs to request from Slurm; 0: none.
        settings: `section.field=value` arguments that override the recipe.
    """
    # sys.exit, because NeMo-Run exits with code 0 after any other exception.
    sys.exit(exit_code(lambda: launch(ctx, recipe, nodes, ranks_per_node, gpus_per_node, settings or [])))


def launch(
    ctx: run.cli.RunContext, recipe: str, nodes: int, ranks_per_node: int, gpus_per_node: int, settings: list[str]
) -> int:
    """Start the ranks, or print their script in a dry run. Returns 1 if ranks failed that were waited for, else 0."""
    words = ["checkpoint.resume=auto", *settings]
    config = load_config(ROOT / recipe, words)  # report errors now, not after hours in the queue
    check_world_size(config.parallel, config.rollout, nodes * ranks_per_node)
    # The job runs a copy of the code, but writes to this checkout, where the next job continues.
    output_dir = ROOT / config.output_dir
    here, folders = absolute_paths(config)
    words += [f"output_dir={output_dir}", *here]
    hf_home = Path(os.environ.get("HF_HOME", ROOT / ".cache/huggingface"))

    executor, python = ctx.executor, PYTHON
    executor.nodes, executor.ntasks_per_node = nodes, ranks_per_node
    if isinstance(executor, run.SlurmExecutor):
        executor.job_name_prefix = f"{config.name}."
        executor.gpus_per_node = gpus_per_node or None
        executor.setup_lines = BATCH_SETUP.format(interrupted=shlex.quote(f"{output_dir}/{config.name}/interrupted"))
        if executor.container_image:
            python = "python"
            executor.container_mounts += [f"{folder}:{folder}" for folder in [output_dir, hf_home, *folders]]
    else:
        executor.env_vars |= {"PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        recipe = f"{ROOT}/{recipe}"
    script = RANK_SCRIPT.format(
        environment="\n".join(
            f"export {name}=${{{name}:-{shlex.quote(value)}}}" for name, value in environment(config, hf_home).items()
        ),
        # Adam of offloaded states runs on the host's cores.
        threads=f"$(($(nproc --all) / {ranks_per_node}))" if config.optimizer.cpu_offload else 1,
        python=shlex.quote(python),
        words=shlex.join([recipe, *words]),
    )
    if not ctx.dryrun:
        for folder in (output_dir, hf_home):
            folder.mkdir(parents=True, exist_ok=True)  # containers can only mount existing folders
    else:
        print(f"# Every rank runs:\n{script}")
    with run.Experiment(config.name) as experiment:
        experiment.add(run.Script(inline=script), executor=executor, name="train", tail_logs=True)
        ctx.launch(experiment)
    return int(any(job.state == AppState.FAILED for job in experiment.jobs))


def absolute_paths(config: RunConfig) -> tuple[list[str], list[Path]]:
    """Settings that lead from the job's copy of the code to this checkout's model and data, and the folders of these.

    A hub id and an absolute path stay as they are.
    """
    folders: set[Path] = set()

    def whole(value: str) -> str:
        path = ROOT / value
        if not value or Path(value).is_absolute() or not glob.glob(str(path)):
            return value
        folders.add(next(folder for folder in path.parents if not glob.has_magic(str(folder))))
        return str(path)

    data = config.data
    named = {"model.hf_path": config.model.hf_path, "data.path": data.path, "data.eval_path": data.eval_path}
    words = [f"{name}={whole(value)}" for name, value in named.items() if whole(value) != value]
    if data.sources:
        sources = [asdict(s) | {"path": whole(s.path), "eval_path": whole(s.eval_path)} for s in data.sources]
        words.append(f"data.sources={json.dumps(sources)}")
    return words, sorted(folders)


def environment(config: RunConfig, hf_home: Path) -> dict[str, str]:
    """Environment variables of ranks, those of slurm/body.sh. Values of the submitting shell win."""
    gpu = KNOWN[config.cluster.gpu].capability if config.cluster else None
    return {
        "HF_HOME": str(hf_home),
        "VLLM_CACHE_ROOT": str(ROOT / config.output_dir / config.name / "cache" / "vllm"),
        "NCCL_DEBUG": "WARN",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **rank_environment(config.parallel, gpu),
    }


# --- Recipes: every file in examples/, on the machines of its section `cluster`, or else on the CPUs of one machine.


def recipe_factory(path: Path) -> Callable[[], run.Partial]:
    def factory() -> run.Partial[aspo]:
        config = load_config(path)
        file = str(path.relative_to(ROOT))
        if config.cluster is None:
            ranks = config.parallel.model_parallel_size + config.rollout.ranks
            return run.Partial(aspo, recipe=file, ranks_per_node=ranks)
        gpus = config.cluster.gpus_per_node
        return run.Partial(aspo, recipe=file, nodes=config.cluster.nodes, ranks_per_node=gpus, gpus_per_node=gpus)

    return run.cli.factory(factory, target=aspo, name=path.stem)


RECIPES = {path.stem: recipe_factory(path) for path in sorted(ROOT.glob("examples/*.yaml"))}


# --- Executors. `run.executor=slurm run.executor.account=NAME` selects one and sets any of its fields.


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """Run on this machine by torchrun."""
    return run.Config(run.LocalExecutor, launcher="torchrun")


@run.cli.factory
def slurm() -> run.Config[run.SlurmExecutor]:
    """Run by Slurm from a login node, in the repository's .venv, with one task per rank."""
    return run.Config(
        run.SlurmExecutor,
        account=None,  # default: SBATCH_ACCOUNT, or the site's; the partition likewise from SBATCH_PARTITION
        time="1-00:00:00",
        exclusive=True,
        mem="0",
        signal="USR1@600",  # to the ranks: ten minutes to finish a step and save
        retries=3,
        tunnel=run.Config(run.LocalTunnel, job_dir=""),
        # Packs the commit. The repository has no submodules; including them would search all folders.
        packager=run.Config(run.GitArchivePackager, check_uncommitted_changes=True, include_submodules=False),
    )


@run.cli.factory
def slurm_container() -> run.Config[run.SlurmExecutor]:
    """Run by Slurm in a container of pyxis; set run.executor.container_image."""
    executor = slurm()
    executor.container_image = os.environ.get("CONTAINER", "set run.executor.container_image or CONTAINER")
    executor.srun_args = ["--no-container-mount-home"]
    return executor


if __name__ == "__main__":
    run.cli.main(aspo, default_factory=RECIPES["tiny"], default_executor=local())
