"""The keys of the recipe's config: a field's type says what it takes, its text what it means.

Checks, ``--help`` and docs follow it. Importing this takes no torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints


class Kind(NamedTuple):
    """What a value is, in a user's words and by a test; as a note of a type, what it is beside."""

    words: str
    fits: Callable[[Any], bool]


class Given(NamedTuple):
    """The arguments that the recipe adds to a component's: by position, and by name."""

    positional: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()


class Key(NamedTuple):
    """A key by its name with dots; required if its default is ``MISSING``."""

    name: str
    kind: Any
    given: Given
    default: Any
    meaning: str  # in Markdown


def keys_of(description: type, prefix: str = "") -> Iterator[Key]:
    """List the keys that the fields of a dataclass describe, and those of dataclasses in it."""
    hints = get_type_hints(description, include_extras=True)
    for field in fields(description):
        kind, *notes, meaning = get_args(hints[field.name])
        given = next((note for note in notes if isinstance(note, Given)), Given())
        yield Key(prefix + field.name, hints[field.name], given, field.default, meaning)
        if is_dataclass(kind):
            yield from keys_of(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]


# What to call, with its arguments beside it
_NAMED = Kind(" with `_component_`", lambda x: isinstance(x.get("_component_"), str))
Component = Annotated[dict, _NAMED]
Components = Annotated[
    list, Kind(" of those", lambda x: x and all(isinstance(y, dict) and _NAMED.fits(y) for y in x))
]
_AT_LEAST_0 = Kind(" of at least 0", lambda x: x >= 0)
_Natural = Annotated[int, _AT_LEAST_0]
_Count = Annotated[int, Kind(" of at least 1", lambda x: x >= 1)]
_Above0 = Annotated[float, Kind(" above 0", lambda x: x > 0)]
_LearningRate = Annotated[float, _AT_LEAST_0] | None
_DType = Literal["fp32", "bf16", "fp64"]


@dataclass(kw_only=True)
class LearningRates:
    """Learning rates of parts of the model, instead of the optimizer's."""

    encoder: Annotated[_LearningRate, "of the vision encoder"] = None
    merger: Annotated[_LearningRate, "of the merger"] = None
    decoder: Annotated[_LearningRate, "of the decoder"] = None


# Of a dataset in a list of them, beside its own arguments
SOURCE_KEYS: dict[str, Any] = {"name": str, "weight": _Above0 | None, "epochs": _Above0 | None}


@dataclass(kw_only=True)
class Parallel:
    """How devices share the model."""

    replicate: Annotated[
        _Count,
        "copies of the model's weights, each divided over `shard` x `context` devices: hybrid "
        "sharding",
    ] = 1
    shard: Annotated[
        _Count | None,
        "devices with rows of their own that share a copy of the weights; null for all that there "
        "are",
    ] = None
    context: Annotated[
        _Count, "devices that share each packed row: its tokens, and frames of its media"
    ] = 1
    tensor: Annotated[
        _Count, "devices that share each decoder layer; not with quantized weights"
    ] = 1
    experts: Annotated[
        _Count,
        "devices, of those of `shard` x `context`, that share a layer's experts, and send each "
        "other tokens; 1: each gathers all experts of a layer",
    ] = 1
    plan: Annotated[Component | None, Given(("model",)), "how they share the layers"] = None
    cpu_offload: Annotated[bool, "weights, gradients and optimizer in the host's memory"]


@dataclass(kw_only=True)
class Config:
    """The config of the recipe ``finetune``; a key with a default may be absent."""

    output_dir: Annotated[str, "directory of all that the run writes"]
    checkpoint_dir: Annotated[str, "checkpoint as the hub has it; stays needed for resuming"]
    tokenizer: Annotated[Component, "the transform; limits of media and length: [data](data.md)"]
    model: Annotated[Component, "what is trained and how, see [adapters](adapters.md)"]
    checkpointer: Annotated[Component, "reads `checkpoint_dir` and writes the export"]
    dataset: Annotated[
        Component | Components,
        Given(("tokenizer",)),
        "see [data](data.md#datasets); of several see [below](#mixtures)",
    ]
    dataset_val: Annotated[
        Component | Components | None,
        Given(("tokenizer",)),
        "the validation set, null for none; without a `_component_`, the keys that differ from "
        "`dataset`'s: `dataset_val.data_files=held_out.jsonl`",
    ] = None
    sampling_temperature: Annotated[
        _Above0, "of several datasets: 1: all samples of each; above: more equal numbers"
    ] = 1.0
    on_bad_sample: Annotated[
        Literal["raise", "skip"],
        "samples that cannot be trained on end the run or are left out, see [below](#bad-samples)",
    ] = "raise"
    max_bad_share: Annotated[_Above0, "with `skip`: a larger share of bad samples ends the run"] = (
        0.01
    )
    rows: Annotated[Component, "what one forward takes: `PackedRows` or `PaddedRows`"]
    rows_per_step: Annotated[_Count, "rows of a step, over all devices"]
    epochs: Annotated[_Count, "how often each sample is trained on"]
    max_steps: Annotated[_Count | None, "how many steps, instead of `epochs`"] = None
    seed: Annotated[_Natural, "of the order of samples, of dropout and of new adapters"]
    shuffle: Annotated[bool, "a random order of samples, new in each epoch"]
    num_workers: Annotated[_Natural, "processes of each device that measure and decode; 0: none"]
    optimizer: Annotated[Component, Given(("params",)), "any of torch, torchao or yours"]
    learning_rates: Annotated[LearningRates, "of parts, instead of `optimizer.lr`"]
    lr_scheduler: Annotated[
        Component | None,
        Given(("optimizer",), keywords=("num_training_steps",)),
        "how learning rates change with the steps; null: they stay",
    ] = None
    clip_grad_norm: Annotated[_Above0 | None, "largest norm of the gradient; null for none"] = None
    device: Annotated[Literal["cuda", "cpu"], "where it computes"]
    dtype: Annotated[
        _DType,
        "of weights, gradients and optimizer; of frozen weights alone with "
        "`model.trained_in_float32`",
    ]
    compute_dtype: Annotated[_DType | None, "of the computation, if it is another"] = None
    float8: Annotated[
        bool,
        "the decoder's linear layers multiply in float8 (torchao), for weights trained in full and "
        "`compute_dtype: bf16`; from compute capability 8.9",
    ] = False
    flash_attention: Annotated[
        Literal["FA3", "FA4"] | None,
        "an implementation of FlashAttention that is installed: `FA3` for Hopper by the package "
        "`flash_attn_interface`, `FA4` by `flash_attn.cute`; null: torch's own",
    ] = None
    compile: Annotated[bool, "`torch.compile`, layer by layer"]
    activation_checkpointing: Annotated[
        Literal["full", "selective", "none"],
        "`full`: every layer is computed again in backward; `selective`: every other; `none`",
    ]
    activation_offloading: Annotated[
        bool, "kept activations wait in the host's memory; with `activation_checkpointing: full`"
    ]
    parallel: Annotated[Parallel, "how devices share the model"]
    save_every_n_steps: Annotated[
        _Count | None,
        "see [below](#stopping-and-going-on), written while the next steps run; null: only when "
        "the run is stopped, at its end, and at the best validation",
    ] = None
    keep_last: Annotated[_Count, "how many steps to keep, beside the best"]
    eval_every_n_steps: Annotated[
        _Count | None, "validation, also before the first step; null: at the end alone"
    ] = None
    metrics: Annotated[
        list[str] | None,
        "by which answers to the questions of `dataset_val` are scored at each validation, see "
        "[evaluation](evaluation.md#metrics); null: none are made",
    ] = None
    max_new_tokens: Annotated[_Count, "of these answers"] = 128
    best_by: Annotated[
        str, "what tells the best validation: loss, the lowest, or one of `metrics`, the highest"
    ] = "loss"
    export: Annotated[
        Literal["last", "best"], "which step: the last, or that of the best validation"
    ] = "last"
    resume: Annotated[bool, "go on from the newest step, if there is one"]
    log_every_n_steps: Annotated[_Count, "a line of the log"]
    metric_logger: Annotated[Component, "torchtune's: disk, TensorBoard, W&B, ..."]
