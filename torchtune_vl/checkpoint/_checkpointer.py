"""Checkpoints in the published layout: in, and out again; merged, in another dtype or cut."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from torchtune_vl._torchtune import ADAPTER_CONFIG, ADAPTER_KEY, MODEL_KEY
from torchtune_vl.checkpoint import _adapters as adapters
from torchtune_vl.files import _directory as directories
from torchtune_vl.files import _safetensors as tensor_io
from torchtune_vl.files._json import read_json_object
from torchtune_vl.files._tensor_names import flat_name
from torchtune_vl.files._together import Together
from torchtune_vl.models._builders import part_of
from torchtune_vl.models._registry import family_of
from torchtune_vl.models._weights import load_weights
from torchtune_vl.modules.adapters import is_adapter

# Files that a complete directory has beside the weights: configs, vocabularies, templates
_COMPANION_SUFFIXES = (".json", ".jinja", ".txt", ".tiktoken")
# ... but for those that speak of files of weights
_OWN = (tensor_io.INDEX, directories.MANIFEST, adapters.CONFIG)
_ADAPTER = "adapter"
_RECIPE_STATE = "recipe_state.pt"
# The last release with which configs looked as those of the published checkpoints do
_TRANSFORMERS_VERSION = "4.57.0"
_FILES_OF_THEIR_OWN = (MODEL_KEY, ADAPTER_KEY, ADAPTER_CONFIG)

Weights = Mapping[str, torch.Tensor]
Dtype = torch.dtype | None  # None for that of each tensor

log = logging.getLogger(__name__)


class HubCheckpointer:
    """torchtune checkpointer of directories as the hub has them.

    Reads the published names of tensors and those that transformers >= 4.52 has in memory, and flat
    and nested configs. Writes ``{output_dir}/epoch_{n}`` as transformers, vLLM and SGLang load it,
    with ``checksums.json``, which loading compares; adapters are merged there, and in ``adapter``
    as peft writes them. A crash leaves each directory complete, as it was before, or not there.

    Args:
        checkpoint_dir: directory to start from.
        output_dir: directory to write into; not the same.
        checkpoint_files: names of the files of weights, by default by the index if there is one.
        adapter_dir: directory of an adapter, of ours or of peft, to go on training from, with the
            rank and alpha of the model. To train anything else on top of it, merge it first.
        model_type: ignored; stock configs state it.
        recipe_checkpoint: ``recipe_state.pt`` of an epoch, by default the one written last.
        should_load_recipe_state: whether to resume: with that, and the weights or the adapter
            beside it. ``ValueError`` if there is nothing to resume from.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        output_dir: str | Path,
        checkpoint_files: Sequence[str] | None = None,
        *,
        adapter_dir: str | Path | None = None,
        model_type: str | None = None,
        recipe_checkpoint: str | Path | None = None,
        should_load_recipe_state: bool = False,
    ) -> None:
        self._checkpoint_dir = Path(checkpoint_dir)
        self._output_dir = Path(output_dir)
        if self._output_dir.resolve().is_relative_to(self._checkpoint_dir.resolve()):
            places = f"output_dir {output_dir} is in checkpoint_dir {checkpoint_dir}"
            raise ValueError(f"{places}: name another, so that what is there stays as it is")
        self._adapter_dir = None if adapter_dir is None else Path(adapter_dir)
        self._weights_dir = directories.survivor(self._checkpoint_dir)
        self._state = self._find_state(recipe_checkpoint) if should_load_recipe_state else None
        if self._state:
            epoch = self._state.parent
            if (epoch / _ADAPTER).is_dir():
                # Elsewhere loading the weights checks what lies beside them
                directories.check_manifest(epoch)
                self._adapter_dir = epoch / _ADAPTER
            else:
                self._weights_dir, checkpoint_files = epoch, None
        named = [self._weights_dir / name for name in checkpoint_files or ()]
        self._files = named or tensor_io.weight_files(self._weights_dir)

    def _find_state(self, given: str | Path | None) -> Path:
        """Find the state of the recipe to resume from, which is in its epoch."""
        epochs = directories.numbered(self._output_dir, "epoch")
        states = [epoch / _RECIPE_STATE for epoch in epochs]
        found = [s for s in states if s.is_file() and Path(given or s).resolve() == s.resolve()]
        if not found:
            reason = f"no epoch_N of {self._output_dir} has {given or _RECIPE_STATE}"
            remedy = "restore it, or start from the weights alone, with checkpoint_dir"
            older = "a recipe_state beside the epochs, as earlier releases wrote it, is not read"
            raise ValueError(f"cannot resume: {reason}: {remedy}; {older}")
        # Two are there only if a crash came before the older one was removed
        return max(found, key=lambda state: state.stat().st_mtime_ns)

    def load_checkpoint(self) -> dict[str, Any]:
        """Load the weights, and to resume the state of the recipe.

        Returns ``model``, from our names to tensors as stored, on the CPU and mapped from the
        files, with those of an adapter, which are in ``adapter`` too, and its ``r``, ``lora_alpha``
        and names of parameters in full, ``modules_to_save``, in ``adapter_config``. Raises
        ``ValueError`` with all files that are missing or damaged, or all tensors that are unknown,
        missing or of another shape than the config says.
        """
        weights = load_weights(self._weights_dir, self._files)
        state: dict[str, Any] = {MODEL_KEY: weights}
        if self._adapter_dir:
            names = family_of(self._weights_dir).names
            adapter = adapters.load_adapter(self._adapter_dir, weights, names)
            told = "The adapter of %s goes on: the model needs its lora_rank %s and lora_alpha %s"
            log.warning(told, self._adapter_dir, adapter.rank, adapter.alpha)
            # Recipes read adapters apart only when they resume, and those among the weights always
            weights.update(adapter.tensors)
            state.update(adapter_state(adapter))
        if self._state:
            state.update(_load_state(self._state))
        return state

    def save_checkpoint(
        self,
        state_dict: dict[str, Any],
        epoch: int,
        intermediate_checkpoint: bool = False,
        adapter_only: bool = False,
        processor_files: Mapping[str, str] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """Write ``epoch_{epoch}``, complete or not at all.

        Args:
            state_dict: what :meth:`load_checkpoint` returns, and the state of the recipe. Without
                ``modules_to_save`` in ``adapter_config``, which torchtune's recipes do not give,
                parts whose biases or normalisations have changed count as trained in full.
            epoch: number of the epoch.
            intermediate_checkpoint: whether to write the state of the recipe too, to resume from.
            adapter_only: whether to write adapters alone, without all else that is trained.
            processor_files: texts of files, by name, that go in place of ``checkpoint_dir``'s.
            group: processes that call this together, all that there are, with the same names in
                the same order, and write files of weights in turn. Weights may be sharded over
                them, or lazy; ``adapter`` is to have what ``modules_to_save`` names, too, then.

        Raises ``ValueError`` if a tensor is not of the model, ``UnpicklingError`` if the state has
        other than tensors and plain values, ``OSError`` if it cannot be written; all is as before.
        """
        if adapter_only and ADAPTER_KEY not in state_dict:
            raise ValueError("adapter_only: there are no adapters to save")
        target = self._output_dir / f"epoch_{epoch}"
        source = directories.survivor(self._checkpoint_dir)
        together = Together(group)
        is_first = together.rank == 0
        with together.new_directory(target) as partial:
            if not adapter_only:
                write_weights(state_dict[MODEL_KEY], partial, source, group=group)
            if not adapter_only and is_first:
                for name, text in (processor_files or {}).items():
                    with directories.new_file(partial / name) as file:
                        file.write_text(text, encoding="utf-8")
                if template := (processor_files or {}).get("chat_template.jinja"):
                    _state_template(partial / "tokenizer_config.json", template)
            if ADAPTER_KEY in state_dict and is_first:
                (partial / _ADAPTER).mkdir()
                adapters.save_adapter(self._adapter(state_dict), partial / _ADAPTER)
            if intermediate_checkpoint and is_first:
                rest = {k: v for k, v in state_dict.items() if k not in _FILES_OF_THEIR_OWN}
                with directories.new_file(partial / _RECIPE_STATE) as file:
                    _save_state(rest, file)
        if not is_first:
            return
        if intermediate_checkpoint:  # states take more than weights: one is kept
            for older in directories.numbered(self._output_dir, "epoch"):
                if older != target and (older / _RECIPE_STATE).is_file():
                    directories.remove_file(older / _RECIPE_STATE)
        log.info("Checkpoint written to %s", target)

    def _adapter(self, state_dict: Mapping[str, Any]) -> adapters.Adapter:
        """The adapters of a recipe's state, and the parts that it trained in full beside them."""
        config, weights = state_dict[ADAPTER_CONFIG], state_dict.get(MODEL_KEY, {})
        in_full = config.get("modules_to_save")
        if in_full is None:
            in_full = self._trained_in_full(weights)
        tensors = {**{name: weights[name] for name in in_full}, **state_dict[ADAPTER_KEY]}
        base, names = str(self._checkpoint_dir.resolve()), family_of(self._checkpoint_dir).names
        return adapters.Adapter(tensors, config["r"], config["lora_alpha"], base, names)

    def _trained_in_full(self, weights: Weights) -> list[str]:
        """Names of the weights of parts whose biases or normalisations have changed.

        torchtune's recipes do not tell, but adapters, merged or not, and NF4 change matrices only.
        """
        names = family_of(self._weights_dir).names
        stored = names.from_published(tensor_io.stored_tensors(self._files, flat_name))
        vectors = {n: at for n, at in stored.items() if n in weights and len(at.shape) == 1}
        changed = {
            part_of(name)
            for name, before in tensor_io.read_tensors(vectors).items()
            if not torch.equal(before.to(weights[name].dtype), weights[name].cpu())
        }
        return [name for name in weights if part_of(name) in changed]


def _save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write the state of a recipe, and see that it can be loaded."""
    try:
        torch.save(state, path)
    except RuntimeError as error:  # what torch makes of an OSError
        raise OSError(f"{path.name}: {error}") from error
    _load_state(path)


def _load_state(path: Path) -> dict[str, Any]:
    """Map the state of a recipe: tensors, also of low-bit optimizers, and plain values alone."""
    import_module("torchao.optim")  # tells torch that these are harmless
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def adapter_state(adapter: adapters.Adapter) -> dict[str, Any]:
    """Put an adapter under the names under which recipes and checkpointers exchange it."""
    matrices = {name: tensor for name, tensor in adapter.tensors.items() if is_adapter(name)}
    in_full = sorted(adapter.tensors.keys() - matrices.keys())
    settings = {"r": adapter.rank, "lora_alpha": adapter.alpha, "modules_to_save": in_full}
    return {ADAPTER_KEY: matrices, ADAPTER_CONFIG: settings}


def write_weights(
    weights: tensor_io.AnyTensors,
    directory: Path,
    source: Path,
    max_size: str = "5GB",
    group: ProcessGroup | None = None,
) -> None:
    """Write weights as published and ``source``'s other files; ``ValueError`` for unknown names."""
    together = Together(group)
    published = together.by_each(lambda: family_of(source).names.to_published(weights))
    tensor_io.write_shards(published, directory, max_size, group)
    if together.rank:
        return
    for path in source.iterdir():
        if path.suffix in _COMPANION_SUFFIXES and path.name not in _OWN and path.is_file():
            with directories.new_file(directory / path.name) as partial:
                shutil.copyfile(path, partial)
    _state_weights(directory / "config.json", {tensor.dtype for tensor in weights.values()})


def _state_template(path: Path, template: str) -> None:
    """State a template for servers that take the tokenizer's, some of them with tools alone."""
    if path.exists():
        directories.write_json(path, {**read_json_object(path).content, "chat_template": template})


def _state_weights(path: Path, dtypes: set[torch.dtype]) -> None:
    """State in a config what transformers goes by: the dtype, in which it loads, and a release.

    Of a directory without a release transformers 4.57.3 to 4.57.6 think that its tokenizer is one
    of Mistral's with a known fault, and offer to change it.
    """
    name = str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
    config = read_json_object(path).content
    parts = [config, *(config.get(part) or {} for part in ("text_config", "vision_config"))]
    stating = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part, key in stating or [(config, "torch_dtype")]:
        part[key] = name
    config.setdefault("transformers_version", _TRANSFORMERS_VERSION)
    directories.write_json(path, config)


def merge(
    base: Path, adapter_dir: Path, output: Path, dtype: Dtype = None, max_shard_size: str = "5GB"
) -> None:
    """Write the checkpoint that a base model and its adapter, of ours or of peft, make.

    Weights have ``dtype``, by default that of each in the base model. Weights do not tell whether
    an adapter was trained on them: a base of another name is logged. Raises ``ValueError`` if a
    directory is damaged or they do not fit, ``OSError`` if the output cannot be written or exists.
    """
    weights = load_weights(base, tensor_io.weight_files(base))
    adapter = adapters.load_adapter(adapter_dir, weights, family_of(base).names)
    if adapter.base and Path(adapter.base).name != base.resolve().name:
        told = "The adapter of %s was trained on %s: see that %s has the same weights"
        log.warning(told, adapter_dir, adapter.base, base)
    with directories.new_directory(output, may_exist=False) as partial:
        merged = adapters.merge_lazily(weights, adapter, dtype)
        write_weights(merged, partial, base, max_shard_size)


def export(source: Path, output: Path, dtype: Dtype = None, max_shard_size: str = "5GB") -> None:
    """Write a checkpoint in the published layout, or an adapter in peft's, as :func:`merge` does.

    ``source`` is the directory of either.
    """
    adapter = adapters.load_adapter(source) if (source / adapters.CONFIG).is_file() else None
    weights = adapter.tensors if adapter else load_weights(source, tensor_io.weight_files(source))
    with directories.new_directory(output, may_exist=False) as partial:
        if adapter:
            tensors = {name: tensor.to(dtype) for name, tensor in weights.items()}
            adapters.save_adapter(adapter._replace(tensors=tensors), partial)
        else:
            cast = {n: tensor_io.cast_lazily(x, dtype or x.dtype) for n, x in weights.items()}
            write_weights(cast, partial, source, max_shard_size)
