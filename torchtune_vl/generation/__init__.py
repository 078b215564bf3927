"""Answers to conversations, by decoding with a cache of keys and values."""

from torchtune_vl.generation._answer_file import AnswerFile, answer_questions
from torchtune_vl.generation._chat import Chat
from torchtune_vl.generation._decoding import Answer, Decoding, Rules, decode
from torchtune_vl.generation._generate import generate
from torchtune_vl.generation._load import load_model
from torchtune_vl.generation._sampling import Sampling

__all__ = [
    "Answer",
    "AnswerFile",
    "Chat",
    "Decoding",
    "Rules",
    "Sampling",
    "answer_questions",
    "decode",
    "generate",
    "load_model",
]
