"""Generation of answers."""

from torchtune_vl.generation._generate import generate

__all__ = ["generate"]
