"""Hugging Face weights to Megatron-Core and back; importing this takes seconds. No tensor may be missing or unknown."""

from __future__ import annotations

import itertools
import json
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_aspo.config.model import ModelConfig
from megatron_aspo.data.tokenizer import unreadable
from megatron_aspo.errors import UserError
from megatron_aspo.journal.files import fresh_folder, partial_path, publish
from megatron_aspo.policy.hf.bridge import open_bridge, quiet
from megatron_aspo.policy.hf.folder import as_stored, copy_configuration, listed, local_folder
from megatron_aspo.ranks.gathering import gather_objects

from megatron.bridge.models.conversion.model_bridge import _megatron_local_name_to_global  # isort: skip
from megatron.bridge.models.conversion.utils import persistent_buffers  # isort: skip

MAX_SHARD_BYTES = 2 << 30
"""Size limit of one file of an exported model."""

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def load_weights(path: str, chunks: Sequence[torch.nn.Module]) -> None:
    """Fill this rank's chunks of the model from the folder or hub id, tensor by tensor. Collective.

    Raises:
        UserError: a tensor is missing, has another shape, or belongs to no parameter.
    """
    models, bridge = _unwrapped(chunks), open_bridge(path)
    present = _stored_shapes(path)
    needed = {name for task in _tasks(bridge, models) for name in _hf_names(task.mapping)}
    needed = set[str]().union(*gather_objects(needed))  # ranks hold different experts
    # A tied model's files may have its embeddings twice, and old files a table that the configuration determines.
    spare = {name for name in present if name.endswith("rotary_emb.inv_freq")}
    spare |= {_EMBEDDINGS[1]} if models[0].share_embeddings_and_output_weights else set()
    missing, extra = sorted(needed - present.keys()), sorted(present.keys() - needed - spare)
    if missing:
        raise UserError(f"model.hf_path={path} lacks {listed(missing)}, which its config.json calls for")
    if extra:
        raise UserError(f"model.hf_path={path} has {listed(extra)}, for which its config.json leaves no place")
    for name, tensor in _saved_by_transformers(bridge.hf_pretrained.config).items():
        if present.get(name, tensor.shape) != tensor.shape:
            shape = tuple(tensor.shape)
            raise UserError(f"model.hf_path={path}: {name} has the shape {present[name]}, its config.json says {shape}")
    for module in itertools.chain.from_iterable(gpt.modules() for gpt in models):
        if getattr(module, "expert_bias", None) is not None:  # Megatron casts it only when it runs
            module.expert_bias.data = module.expert_bias.data.float()
    with quiet():
        bridge.load_hf_weights(models)


def _stored_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in the files of a folder or hub id."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, tuple[tuple[int, ...], str]] = {}
    try:
        folder = local_folder(path, "*.safetensors", "*.safetensors.index.json")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        else:
            files = set(folder.glob("*.safetensors"))
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    tensor = tensors.get_slice(name)
                    stored[name] = tuple(tensor.get_shape()), tensor.get_dtype()
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable(path, error) from None
    if not stored:
        raise unreadable(path, ValueError("it has no *.safetensors"))
    return open_bridge(path).hf_pretrained.state.source.form.shapes(stored)


def _saved_by_transformers(config: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors that transformers would save, on the meta device, by the names in files (where each expert has its own
    tensors)."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        saved = revert_weight_conversion(model, model.state_dict())
    tied = _EMBEDDINGS[1] if config.tie_word_embeddings else None
    return {name: tensor for name, tensor in saved.items() if name != tied}


@dataclass(frozen=True)
class Consumed:
    """A parameter of this rank and the tensors that it consists of.

    Attributes:
        names: tensors of the model's files.
        parts: ranks that the tensors are split over.
    """

    parameter: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    parts: int
    is_expert: bool


def consumed_tensors(path: str, models: list[Any]) -> list[Consumed]:
    """The tensors that this rank's chunks of the model take from the files; reads no file and is not collective.

    Raises:
        UserError: the bridge does not support one of the parameters.
    """
    bridge = open_bridge(path)
    model_bridge = bridge._model_bridge
    model_bridge.hf_config = bridge.hf_pretrained.config
    registry = model_bridge.mapping_registry()
    consumed: list[Consumed] = []
    config = models[0].config
    tensors: list[tuple[int, str, Tensor]] = []
    for chunk, gpt in enumerate(models):
        tensors += ((chunk, *x) for x in itertools.chain(gpt.named_parameters(), persistent_buffers(gpt)))
    for chunk, name, parameter in tensors:
        if models[0].share_embeddings_and_output_weights and name.startswith("output_layer."):
            continue  # a copy of the embedding
        mapping = registry.megatron_to_hf_lookup(_megatron_local_name_to_global(models, config, name, chunk))
        if mapping is None:
            raise UserError(f"Megatron-Bridge does not support the parameter {name} of a model like {path}")
        is_split = getattr(parameter, "tensor_model_parallel", False)
        dense = getattr(parameter, "allreduce", True)
        ranks = config.tensor_model_parallel_size if dense else config.expert_tensor_parallel_size
        names, shape = tuple(_hf_names(mapping)), tuple(parameter.shape)
        consumed.append(Consumed(name, names, shape, ranks if is_split else 1, ".experts." in name))
    return consumed


def file_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a folder's tensors; without tensors, those that transformers would write for its config.json."""
    if any(Path(path).glob("*.safetensors")):
        return _stored_shapes(path)
    saved = _saved_by_transformers(open_bridge(path).hf_pretrained.config)
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def export_weights(
    config: ModelConfig, chunks: Sequence[torch.nn.Module], vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the whole model in Hugging Face's names and shapes, one at a time. Collective: every rank must
    exhaust the iterator.

    Every rank gets every tensor whole, in the model's dtype and on its device. A tensor may be a parameter's own
    memory: copy it before it is changed or kept beyond the step.

    Raises:
        UserError: the model did not come from Hugging Face.
    """
    if not config.hf_path:
        raise UserError("only a model that came from Hugging Face's format can go back there; set model.hf_path")
    yield from export_whole(open_bridge(config.hf_path), chunks, vocab_size)


def export_whole(bridge: Any, chunks: Sequence[torch.nn.Module], vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """As `export_weights`, for a model of any bridge."""
    models = _unwrapped(chunks)
    yield from _exported(bridge, models, _tasks(bridge, models), vocab_size)


def export_share(bridge: Any, chunks: Sequence[torch.nn.Module], vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """This rank's share of what `export_whole` yields: every tensor is in the share of one rank. Collective.

    A tensor stays in its stage of the pipeline, and an expert in its expert-parallel rank: the ranks that hold the
    tensor, whole or split, divide such tensors by size. Only the tensor-parallel ranks of its owner gather it.
    """
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dense = _Holders(replicas, parallel_state.get_tensor_model_parallel_group())
    replicas = parallel_state.get_expert_data_parallel_group()
    experts = _Holders(replicas, parallel_state.get_expert_tensor_parallel_group())
    models, owns = _unwrapped(chunks), False

    def gathered() -> Iterator[Any]:
        nonlocal owns
        for task in _tasks(bridge, models):
            if task.megatron_module is None:  # another stage has the tensor
                continue
            holders = experts if task.mapping.is_expert else dense
            gathers, owns = holders.assign(task.param_weight.numel())
            if gathers:
                task.mapping.set_process_groups_from_pg_collection(types.SimpleNamespace(pp=_Alone, ep=_Alone))
                yield task

    for weight in _exported(bridge, models, gathered(), vocab_size):  # takes a task when it has exported the last one
        if owns:
            yield weight


class _Holders:
    """The ranks that hold the same tensors: `replicas`, each of which is split over `shards`."""

    def __init__(self, replicas: Any, shards: Any) -> None:
        self._replicas, self._shards = replicas, shards
        self._elements = [0] * (replicas.size() * shards.size())

    def assign(self, elements: int) -> tuple[bool, bool]:
        """Give the next tensor to the rank that has the least. Returns whether this rank gathers and whether it owns
        it."""
        owner = self._elements.index(min(self._elements))
        self._elements[owner] += elements
        replica, shard = divmod(owner, self._shards.size())
        gathers = replica == self._replicas.rank()
        return gathers, gathers and shard == self._shards.rank()


class _Alone:
    """A process group of one rank, for the bridge."""

    size = staticmethod(lambda: 1)
    rank = staticmethod(lambda: 0)


def _exported(bridge: Any, models: list[Any], tasks: Iterable[Any], vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    exported = bridge.export_hf_weights(
        models, show_progress=False, conversion_tasks=tasks, cpu=False, merge_adapter_weights=False
    )
    for name, tensor in exported:
        yield name, (tensor[:vocab_size] if name in _EMBEDDINGS else tensor).detach()


def save_folder(folder: Path, config: ModelConfig, chunks: Sequence[torch.nn.Module], vocab_size: int) -> list[str]:
    """Write the model in Hugging Face's format, with its original configuration and tokenizer. Collective; rank 0
    writes, and holds few files' tensors (`MAX_SHARD_BYTES` each) of the whole model.

    A vision encoder and layers that predict further tokens (MTP) are those of `config.hf_path`, without FP8. The policy
    has moved on since: as drafts for speculative decoding MTP is stale. Returns the names of these tensors, on rank 0.

    Raises:
        UserError: `folder` exists already.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or name another folder")
    dist.barrier()  # before rank 0 creates the folder that the other ranks check
    exported, kept = export_weights(config, chunks, vocab_size), list[str]()
    if dist.get_rank() == 0:
        partial = partial_path(folder)
        fresh_folder(partial)
        hf, dtype = open_bridge(config.hf_path).hf_pretrained, getattr(torch, config.dtype)
        source, planned = hf.state.source, _saved_by_transformers(hf.config, dtype)
        planned = dict(as_stored(source.places, planned.items()))
        kept = source.form.kept(source.places)
        planned |= {name: source.kept_tensor(name, dtype).to("meta") for name in kept}
        further = ((name, source.kept_tensor(name, dtype)) for name in kept)
        stored = as_stored(source.places, ((name, tensor.cpu()) for name, tensor in exported))
        _write_shards(partial, itertools.chain(stored, further), planned)
        copy_configuration(config, partial, bool(kept) or source.form.with_images)
        publish(folder)
    for _ in exported:
        pass
    dist.barrier()
    return kept


def _write_shards(folder: Path, exported: Iterator[tuple[str, Tensor]], planned: dict[str, Tensor]) -> None:
    """Write every file once all of its tensors have arrived. `planned` holds them on the meta device."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(planned, max_shard_size=MAX_SHARD_BYTES)
    shards: dict[str, dict[str, Tensor]] = {file: {} for file in split.filename_to_tensors}
    for name, tensor in exported:
        file = split.tensor_to_filename[name]
        shards[file][name] = tensor.cpu().clone()
        if len(shards[file]) == len(split.filename_to_tensors[file]):
            save_file(shards.pop(file), folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # safetensors makes it unreadable for others
    assert not shards, f"tensors of {sorted(shards)} were not exported"
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _tasks(bridge: Any, models: list[Any]) -> list[Any]:
    """The bridge's plan: for every parameter the tensors that it consists of."""
    with quiet():
        tasks: list[Any] = bridge._model_bridge.build_conversion_tasks(bridge.hf_pretrained, models)
    if None in tasks:
        raise UserError(
            f"Megatron-Bridge does not support {sum(task is None for task in tasks)} parameters of a model like "
            f"{bridge.hf_pretrained.model_name_or_path}; train another architecture"
        )
    return tasks


def _hf_names(mapping: Any) -> list[str]:
    names = mapping.hf_param
    return [names] if isinstance(names, str) else list(names.values())


def _unwrapped(chunks: Sequence[Any]) -> list[Any]:
    """The GPTModels inside the wrappers for data parallelism and 16-bit weights."""
    models = list(chunks)
    while hasattr(models[0], "module"):
        models = [model.module for model in models]
    return models
