"""Generation of answers."""

from torchtune_vl.generation._generate import generate, until_stop

__all__ = ["generate", "until_stop"]
