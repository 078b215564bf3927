"""Published checkpoints: in, and out again, with adapters in peft's files or merged."""

from torchtune_vl.checkpoint._checkpointer import HubCheckpointer, export, merge

__all__ = ["HubCheckpointer", "export", "merge"]
