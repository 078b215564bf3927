"""All that we take of torchtune 0.6.1, its last release: public names, each with its reason.

Another module could give them. It takes seconds to import: nothing does before it needs a model.
"""

from torchtune_vl import _torchao as _torchao  # isort: skip (torchtune would not import before it)

# `_component_` of configs, and its arguments beside it, to objects
from torchtune.config import instantiate

# The type by which its recipes know the layers that they compile, checkpoint and shard
from torchtune.modules import TransformerSelfAttentionLayer

# Linear layers with adapters, whose `adapter_params` tell its recipes what to train
from torchtune.modules.peft import DoRALinear, LoRALinear

# Names in states of its checkpointers and recipes; activations that wait in the host's memory
from torchtune.training import ADAPTER_CONFIG, ADAPTER_KEY, MODEL_KEY, OffloadActivations

# A logger that prints, in its recipes and in ours, and what the first process alone says
from torchtune.utils import get_logger, log_rank_zero
