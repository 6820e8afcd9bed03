"""The model's files and a checkpoint against every kind of rank of a run, each built at full size without memory.

The layers are Megatron-Core's own, which consist of the same tensors as Transformer Engine's.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
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

from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.policy.architecture import Architecture
from megatron_aspo.policy.hf.folder import listed
from megatron_aspo.policy.model import build_gpt, read_architecture
from megatron_aspo.policy.parallel import initialize_parallel
from megatron_aspo.tools.rehearsal.run import Parts


@dataclass(frozen=True)
class _Kind:
    """Content of one rank."""

    stage: int
    expert: int
    consumed: list[Any]
    shards: list[Any]


def build_kinds(config: RunConfig, world: int, vocab_size: int) -> Parts:
    """Build every kind of rank and compare it with the model's files and with a checkpoint's rules.

    Args:
        config: with `model.hf_path` a local folder.
        world: ranks that train.

    Raises:
        UserError: Megatron-Core refuses the layout, or config.json and the files contradict each other.
    """
    kinds: list[_Kind] = []
    architecture: Architecture | None = None
    for rank in kind_ranks(config, world):
        with _fake_rank(config, world, rank):
            architecture = architecture or read_architecture(config.model, config.parallel, vocab_size)
            kinds.append(_build(config, architecture, vocab_size))
    assert architecture is not None
    tensors, findings = _check_files(config, kinds, architecture.tie_embeddings) if config.model.hf_path else (0, [])
    keys = {shard.key for kind in kinds for shard in kind.shards}
    return Parts(len(kinds), tensors, len(keys), findings + _check_shards(kinds))


def kind_ranks(config: RunConfig, world: int) -> list[int]:
    """One rank per pipeline stage, tensor- and expert-parallel position. Data- and context-parallel ranks hold the same
    weights and are built once."""
    parallel = config.parallel
    tensor, etp, expert = parallel.tensor, parallel.expert_tensor_size, parallel.expert
    per_stage = world // parallel.pipeline  # Megatron's order: tensor first, pipeline last
    seen: dict[tuple[int, int, int, int], int] = {}
    for rank in range(world):
        stage, within = divmod(rank, per_stage)
        seen.setdefault((stage, within % tensor, within % etp, within // etp % expert), rank)
    return list(seen.values())


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


def _build(config: RunConfig, architecture: Architecture, vocab_size: int) -> _Kind:
    try:
        with torch.device("meta"):
            models = build_gpt(config, architecture, vocab_size)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise _refused(error) from error
    consumed: list[Any] = []
    if config.model.hf_path:
        from megatron_aspo.policy.hf import weights

        consumed = weights.consumed_tensors(config.model.hf_path, models)
    state: dict[str, Any] = {str(i): gpt.sharded_state_dict() for i, gpt in enumerate(models)}
    apply_factories(state)
    shards = [shard.without_data() for shard in nested_values(state) if isinstance(shard, ShardedBase)]
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return _Kind(stage, parallel_state.get_expert_model_parallel_rank(), consumed, shards)


def _refused(error: Exception) -> UserError:
    return UserError(f"Megatron-Core refuses the layout: {' '.join(str(error).split()) or type(error).__name__}")


def _check_files(config: RunConfig, kinds: list[_Kind], tied: bool) -> tuple[int, list[str]]:
    """Whether every tensor of the files goes to one pipeline stage, and an expert's to one expert-parallel position.
    Returns the number of tensors, and the findings."""
    from megatron_aspo.policy.hf import weights

    present = weights.file_shapes(config.model.hf_path)
    findings: list[str] = []
    takers: dict[str, set[tuple[int, int]]] = {}
    for kind in kinds:
        names = [name for consumed in kind.consumed for name in consumed.names]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            findings.append(f"stage {kind.stage} takes {listed(twice)} of the model's files twice")
        for consumed in kind.consumed:
            place = (kind.stage, kind.expert if consumed.is_expert else 0)
            for name in consumed.names:
                takers.setdefault(name, set()).add(place)
            findings += _check_size(consumed, present)
    spare = {"lm_head.weight"} if tied else set[str]()
    if missing := sorted(takers.keys() - present.keys()):
        findings.append(f"the model's files lack {listed(missing)}, which config.json calls for")
    if extra := sorted(present.keys() - takers.keys() - spare):
        findings.append(f"the model's files have {listed(extra)}, for which config.json leaves no place")
    if shared := sorted(name for name, places in takers.items() if len(places) > 1):
        findings.append(f"several pipeline stages or experts take {listed(shared)} of the model's files")
    return len(takers), list(dict.fromkeys(findings))


def _check_size(consumed: Any, present: dict[str, tuple[int, ...]]) -> list[str]:
    shapes = [present[name] for name in consumed.names if name in present]
    if len(shapes) < len(consumed.names):
        return []  # reported as missing
    in_files = sum(torch.Size(shape).numel() for shape in shapes)
    found = torch.Size(consumed.shape).numel() * consumed.parts
    padding = 0
    if consumed.parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padding = -shapes[0][0] % consumed.parts * shapes[0][1]
    if found == in_files + padding:
        return []
    return [
        f"{', '.join(consumed.names)} of the model's files have {in_files} numbers, and {consumed.parameter} on "
        f"{consumed.parts} ranks takes {found}"
    ]


def _check_shards(kinds: list[_Kind]) -> list[str]:
    """Megatron's check that all shards together cover every tensor of a checkpoint once."""
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())  # only rank 0 checks
    try:
        with torch.device("cpu"):
            validate_sharding_integrity([kind.shards for kind in kinds])
    except CheckpointingException as error:
        return [f"a checkpoint would not be whole: {' '.join(str(error).split())[:300]}"]
    finally:
        dist.destroy_process_group()
    return []


def main() -> None:
    """Check the pickled (configuration, training ranks, vocabulary) on standard input, and pickle the result into the
    file named."""
    failed = 0
    try:
        Path(sys.argv[1]).write_bytes(pickle.dumps(build_kinds(*pickle.load(sys.stdin.buffer))))
    except UserError as error:
        print(error, file=sys.stderr)
        failed = 2
    except Exception:
        traceback.print_exc()
        failed = 1
    sys.stderr.flush()
    os._exit(failed)


if __name__ == "__main__":
    main()
