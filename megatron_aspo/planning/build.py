"""The full-size dry run: every kind of rank's part of the model, built without memory by the code that trains.

torch's fake process group pretends the world, and the meta device the weights. Importing this takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factories
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_aspo.config import RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.planning.architectures import find_hf_config
from megatron_aspo.planning.memory import training_ranks
from megatron_aspo.planning.parameters import Count, stage_parameters
from megatron_aspo.planning.plan import Plan
from megatron_aspo.policy import cpu
from megatron_aspo.policy.hf_folder import listed
from megatron_aspo.policy.model import Architecture, build_gpt, initialize_parallel, read_architecture


@dataclass(frozen=True)
class Built:
    """What was built and found in order.

    Attributes:
        ranks: kinds of ranks: one of each pipeline stage, tensor-parallel and expert-parallel position.
        tensors: of the model's files, each consumed once; 0 for a model without files.
        checkpoint_tensors: each covered once by the shards of all ranks.
        parameters: of the whole model.
    """

    ranks: int
    tensors: int
    checkpoint_tensors: int
    parameters: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        files = f", {self.tensors} tensors of its files each consumed once" if self.tensors else ""
        return (
            f"built {self.ranks} kinds of ranks at full size in {self.seconds:.0f} s: {self.parameters / 1e9:.3f} B "
            f"parameters as counted{files}, {self.checkpoint_tensors} tensors of a checkpoint whole"
        )


@dataclass(frozen=True)
class _Role:
    """What a rank was found to hold."""

    stage: int
    expert: int
    consumed: list[Any]
    shards: list[Any]


def build_plan(plan: Plan, vocab_size: int = 128) -> Built:
    """Build every kind of rank and hold it against the plan, Megatron's own checks and the model's files.

    The layers are Megatron-Core's own. Of latent attention they split what Transformer Engine's have whole on every
    tensor-parallel rank, so there each stage is counted anew, and the plan's numbers stand unchecked.

    Raises:
        UserError: Megatron refuses the layout; parameters are not as counted; a tensor of the files is missing, left
            over, taken twice or of another size; a checkpoint would not be whole.
    """
    start = time.perf_counter()
    if torch.cuda.is_available():
        raise UserError(
            "plan --build builds the layers of a CPU; hide the GPUs: CUDA_VISIBLE_DEVICES= megatron-aspo ..."
        )
    cpu.enable()
    with _local_config(plan.config) as config:
        vocabulary = plan.shape.vocab_size if config.model.hf_path else vocab_size
        roles: list[_Role] = []
        counted = stage_parameters(plan.shape, config.parallel, te_layers=False)
        architecture: Architecture | None = None
        world = training_ranks(config, plan.world)
        for rank in role_ranks(config, world):
            with _fake_rank(config, world, rank):
                architecture = architecture or read_architecture(config, vocabulary)
                roles.append(_build_role(config, architecture, vocabulary, counted))
        tensors = _check_files(plan, config, roles) if config.model.hf_path else 0
        keys = _check_shards(roles)
    return Built(len(roles), tensors, keys, _whole(plan), time.perf_counter() - start)


def role_ranks(config: RunConfig, world: int) -> list[int]:
    """A rank of every kind: of each pipeline stage, tensor- and expert-parallel position. Data- and context-parallel
    ranks hold the same weights and are built once."""
    parallel = config.parallel
    tensor, etp, expert = parallel.tensor, parallel.expert_tensor_size, parallel.expert
    per_stage = world // parallel.pipeline  # Megatron's order: tensor first, pipeline last
    seen: dict[tuple[int, int, int, int], int] = {}
    for rank in range(world):
        stage, within = divmod(rank, per_stage)
        seen.setdefault((stage, within % tensor, within % etp, within // etp % expert), rank)
    return list(seen.values())


@contextlib.contextmanager
def _local_config(config: RunConfig) -> Iterator[RunConfig]:
    """The run with a folder in the place of a hub model, which has its config.json at least."""
    path = config.model.hf_path
    if not path or (Path(path) / "config.json").is_file():
        yield config
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(find_hf_config(path)))
        yield replace(config, model=replace(config.model, hf_path=folder))


@contextlib.contextmanager
def _fake_rank(config: RunConfig, world: int, rank: int) -> Iterator[None]:
    """This process as one rank of the world, with Megatron's groups."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        try:
            initialize_parallel(config.parallel, config.seed, gloo=False)
        except (RuntimeError, AssertionError) as error:
            raise _refused(error) from error
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _build_role(config: RunConfig, architecture: Architecture, vocab_size: int, counted: list[Count]) -> _Role:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    try:
        with torch.device("meta"):
            gpt = build_gpt(config, architecture, vocab_size)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise _refused(error) from error
    _check_count(gpt, stage, counted[stage])
    consumed: list[Any] = []
    if config.model.hf_path:
        from megatron_aspo.policy import hf

        consumed = hf.consumed_tensors(config.model.hf_path, gpt)
    state: dict[str, Any] = gpt.sharded_state_dict()
    apply_factories(state)
    shards = [shard.without_data() for shard in nested_values(state) if isinstance(shard, ShardedBase)]
    return _Role(stage, parallel_state.get_expert_model_parallel_rank(), consumed, shards)


def _refused(error: Exception) -> UserError:
    return UserError(f"Megatron-Core refuses the layout: {' '.join(str(error).split()) or type(error).__name__}")


def _check_count(gpt: torch.nn.Module, stage: int, counted: Count) -> None:
    found = Count()
    for parameter in gpt.parameters():
        is_expert = not getattr(parameter, "allreduce", True)
        found += Count(expert=parameter.numel()) if is_expert else Count(dense=parameter.numel())
    # Without expert parallelism Megatron reduces experts with the rest.
    if found.total != counted.total or (found.expert and found != counted):
        raise UserError(f"stage {stage} has {found.total} parameters a rank, and {counted.total} were planned")


def _check_files(plan: Plan, config: RunConfig, roles: list[_Role]) -> int:
    """Every tensor of the files goes to one place: one pipeline stage, and there all ranks, or for an expert's one
    expert-parallel position."""
    from megatron_aspo.policy import hf

    path = plan.config.model.hf_path
    present = hf.file_shapes(config.model.hf_path)
    takers: dict[str, set[tuple[int, int]]] = {}
    for role in roles:
        names = [name for consumed in role.consumed for name in consumed.names]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"model.hf_path={path}: stage {role.stage} takes {listed(twice)} twice")
        for consumed in role.consumed:
            place = (role.stage, role.expert if consumed.is_expert else 0)
            for name in consumed.names:
                takers.setdefault(name, set()).add(place)
            _check_size(path, consumed, present)
    spare = {"lm_head.weight"} if plan.shape.tied else set[str]()
    if missing := sorted(takers.keys() - present.keys()):
        raise UserError(f"model.hf_path={path} lacks {listed(missing)}, which its config.json calls for")
    if extra := sorted(present.keys() - takers.keys() - spare):
        raise UserError(f"model.hf_path={path} has {listed(extra)}, for which its config.json leaves no place")
    if shared := sorted(name for name, places in takers.items() if len(places) > 1):
        raise UserError(f"model.hf_path={path}: several pipeline stages or experts take {listed(shared)}")
    return len(takers)


def _check_size(path: str, consumed: Any, present: dict[str, tuple[int, ...]]) -> None:
    shapes = [present[name] for name in consumed.names if name in present]
    if len(shapes) < len(consumed.names):
        return  # told as missing
    wanted = sum(torch.Size(shape).numel() for shape in shapes)
    found = torch.Size(consumed.shape).numel() * consumed.parts
    padding = 0
    if consumed.parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padding = -shapes[0][0] % consumed.parts * shapes[0][1]
    if found != wanted + padding:
        raise UserError(
            f"model.hf_path={path}: {', '.join(consumed.names)} have {wanted} numbers, and {consumed.parameter} on "
            f"{consumed.parts} ranks takes {found}"
        )


def _check_shards(roles: list[_Role]) -> int:
    """Megatron's own check that the shards of all ranks cover every tensor of a checkpoint once."""
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())  # only rank 0 checks
    try:
        with torch.device("cpu"):
            validate_sharding_integrity([role.shards for role in roles])
    except CheckpointingException as error:
        raise UserError(f"a checkpoint would not be whole: {' '.join(str(error).split())[:300]}") from error
    finally:
        dist.destroy_process_group()
    return len({shard.key for role in roles for shard in role.shards})


def _whole(plan: Plan) -> int:
    from megatron_aspo.planning.parameters import total_parameters

    return total_parameters(plan.shape)
