"""Checkpoints in the published layout: in, and out again."""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torchtune import training
from torchtune.training.checkpointing._utils import check_outdir_not_in_ckptdir

from torchtune_vl.models.qwen2_5_vl import (
    qwen2_5_vl_from_config,
    qwen2_5_vl_hf_to_tune,
    qwen2_5_vl_tune_to_hf,
)
from torchtune_vl.models.qwen2_5_vl._convert_weights import published_name
from torchtune_vl.training._tree_file import load_tree, save_tree

_INDEX = "model.safetensors.index.json"
_OUTPUT_LAYER = "lm_head.weight"
_TOKEN_EMBEDDING = "model.embed_tokens.weight"
# Files that a complete directory has beside the weights: configs, vocabularies, templates
_COMPANION_SUFFIXES = (".json", ".jinja", ".txt", ".tiktoken")

log = logging.getLogger(__name__)


class _Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    name: str
    shape: tuple[int, ...]


class Qwen2_5_VLCheckpointer:
    """torchtune checkpointer of directories as the hub has them.

    Reads one safetensors file or several with an index, with the published names of tensors or
    those that transformers >= 4.52 has in memory, and a flat or nested ``config.json``. Writes
    ``{output_dir}/epoch_{n}``: weights with the published names, in files of at most 5 GB, and
    config, tokenizer and processor files beside them, so that transformers, vLLM and SGLang load
    the directory as it is.

    Args:
        checkpoint_dir: directory to start from.
        output_dir: directory to write into; not the same.
        checkpoint_files: names of the files of weights in ``checkpoint_dir``; by default those of
            the index, or ``model.safetensors``.
        model_type: ignored; stock configs state it.
        recipe_checkpoint: file with the state of the recipe, by default
            ``{output_dir}/recipe_state/recipe_state.safetensors``.
        should_load_recipe_state: whether to resume: weights come from the newest epoch in
            ``output_dir``, and the recipe's state is loaded too.

    Raises:
        ValueError: if there are no weights, or nothing to resume from.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        output_dir: str | Path,
        checkpoint_files: Sequence[str] | None = None,
        *,
        model_type: str | None = None,
        recipe_checkpoint: str | Path | None = None,
        should_load_recipe_state: bool = False,
    ) -> None:
        self._checkpoint_dir = Path(checkpoint_dir)
        self._output_dir = Path(output_dir)
        check_outdir_not_in_ckptdir(ckpt_dir=self._checkpoint_dir, out_dir=self._output_dir)
        self._resume = should_load_recipe_state
        self._recipe_checkpoint = Path(
            recipe_checkpoint or self._output_dir / "recipe_state" / "recipe_state.safetensors"
        )
        self._weights_dir = (
            _newest_epoch(self._output_dir) if self._resume else self._checkpoint_dir
        )
        if checkpoint_files and not self._resume:
            self._files = [self._checkpoint_dir / name for name in checkpoint_files]
        else:
            self._files = _weight_files(self._weights_dir)

    def load_checkpoint(self) -> dict[str, Any]:
        """Load the weights, and to resume the state of the recipe.

        Returns:
            ``model``, from our names to tensors as stored, on the CPU; to resume also the keys
            that the recipe had saved.

        Raises:
            ValueError: if a file is missing or damaged, or tensors are unknown, missing or of
                another shape than the config says; it lists all of them.
        """
        with torch.device("meta"):
            model = qwen2_5_vl_from_config(self._weights_dir)
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in qwen2_5_vl_tune_to_hf(model.state_dict()).items()
        }
        stored = _stored_tensors(self._files)
        _drop_tied_output_layer(stored, expected)
        _refuse_differences(stored, expected, self._weights_dir)
        state: dict[str, Any] = {training.MODEL_KEY: qwen2_5_vl_hf_to_tune(_read(stored))}
        if self._resume:
            if not self._recipe_checkpoint.is_file():
                raise ValueError(f"cannot resume: there is no {self._recipe_checkpoint}")
            state.update(load_tree(self._recipe_checkpoint))
        return state

    def save_checkpoint(
        self,
        state_dict: dict[str, Any],
        epoch: int,
        intermediate_checkpoint: bool = False,
        adapter_only: bool = False,
    ) -> None:
        """Write ``epoch_{epoch}``, complete or not at all.

        Args:
            state_dict: ``model``, from our names to tensors, and the state of the recipe.
            epoch: number of the epoch.
            intermediate_checkpoint: whether to write the state of the recipe too, to resume from.
            adapter_only: not supported, there are no adapters yet.

        Raises:
            ValueError: if only adapters are asked for, or a tensor is not of the model.
        """
        if adapter_only:
            raise ValueError("adapter_only is not supported: there are no adapters to save")
        weights = qwen2_5_vl_tune_to_hf(state_dict[training.MODEL_KEY])
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        target = self._output_dir / f"epoch_{epoch}"
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _copy_companions(self._checkpoint_dir, partial)
        _state_dtype(partial / "config.json", {tensor.dtype for tensor in weights.values()})
        _write_shards(weights, partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        log.info("Checkpoint written to %s", target)
        if intermediate_checkpoint:
            recipe_state = {k: v for k, v in state_dict.items() if k != training.MODEL_KEY}
            self._save_recipe_state(recipe_state)

    def _save_recipe_state(self, recipe_state: dict[str, Any]) -> None:
        path = self._output_dir / "recipe_state" / "recipe_state.safetensors"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        save_tree(recipe_state, partial)
        partial.replace(path)


def _newest_epoch(output_dir: Path) -> Path:
    epochs = {
        int(match[1]): path
        for path in output_dir.glob("epoch_*")
        if (match := re.fullmatch(r"epoch_(\d+)", path.name))
    }
    if not epochs:
        raise ValueError(f"cannot resume: {output_dir} has no epoch_N directory")
    return epochs[max(epochs)]


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors files ({error!r})") from None
        return [directory / name for name in sorted(names)]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    raise ValueError(
        f"{directory} has neither {_INDEX} nor model.safetensors: name the files of weights in "
        "checkpoint_files, or download the checkpoint again"
    )


def _stored_tensors(files: Sequence[Path]) -> dict[str, _Stored]:
    """All tensors of the files by their published names."""
    stored: dict[str, _Stored] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    place = _Stored(path, name, tuple(file.get_slice(name).get_shape()))
                    other = stored.setdefault(published_name(name), place)
                    if other is not place:
                        raise ValueError(
                            f"{name} of {path} is in {other.path} as well ({other.name})"
                        )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): download the file again") from None
    return stored


def _drop_tied_output_layer(
    stored: dict[str, _Stored], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Accept an output layer beside tied embeddings, which some trainers write, if it is equal."""
    if _OUTPUT_LAYER in expected or _OUTPUT_LAYER not in stored or _TOKEN_EMBEDDING not in stored:
        return
    names = (_OUTPUT_LAYER, _TOKEN_EMBEDDING)
    values = _read({name: stored[name] for name in names})
    output = stored.pop(_OUTPUT_LAYER)
    if not torch.equal(values[_OUTPUT_LAYER], values[_TOKEN_EMBEDDING]):
        raise ValueError(
            f"{output.path}: {output.name} differs from the token embedding, but config.json says "
            "tie_word_embeddings: set it to false if the output layer was trained on its own"
        )


def _refuse_differences(
    stored: Mapping[str, _Stored], expected: Mapping[str, tuple[int, ...]], directory: Path
) -> None:
    unknown = [
        f"{place.name} ({place.path.name})"
        for name, place in stored.items()
        if name not in expected
    ]
    missing = [name for name in expected if name not in stored]
    misshapen = [
        f"{name} is {list(stored[name].shape)} in {stored[name].path.name}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = {"unknown": unknown, "missing": missing, "of another shape": misshapen}
    lines = [
        f"{len(found)} tensors {what}:\n  " + "\n  ".join(found)
        for what, found in problems.items()
        if found
    ]
    if lines:
        raise ValueError(f"the weights do not fit {directory / 'config.json'}\n" + "\n".join(lines))


def _read(stored: Mapping[str, _Stored]) -> dict[str, torch.Tensor]:
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in {place.path for place in stored.values()}
        }
        return {name: files[place.path].get_tensor(place.name) for name, place in stored.items()}


def _copy_companions(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.suffix in _COMPANION_SUFFIXES and path.name != _INDEX and path.is_file():
            shutil.copyfile(path, target / path.name)


def _state_dtype(path: Path, dtypes: set[torch.dtype]) -> None:
    """State the dtype of the weights in a config, since transformers loads in what it states."""
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    name = str(dtype).removeprefix("torch.")
    config = json.loads(path.read_text(encoding="utf-8"))
    parts = [config, config.get("text_config") or {}, config.get("vision_config") or {}]
    stating = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part, key in stating or [(config, "torch_dtype")]:
        part[key] = name
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_shards(weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    plan = split_torch_state_dict_into_shards(dict(weights), max_shard_size="5GB")
    for filename, names in plan.filename_to_tensors.items():
        shard = {name: weights[name] for name in names}
        save_file(shard, directory / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (directory / _INDEX).write_text(text, encoding="utf-8")
