"""Training; the checkpointer is of the room checkpoint, and here by its first name too."""

from torchtune_vl.checkpoint import HubCheckpointer as Qwen2_5_VLCheckpointer
from torchtune_vl.checkpoint import export, merge

__all__ = ["Qwen2_5_VLCheckpointer", "export", "merge"]
