"""Conversations to token ids, masks and media; knows no model."""

from torchtune_vl.chat._boxes import boxes_in_original
from torchtune_vl.chat._chat_template import CHAT_TEMPLATE
from torchtune_vl.chat._processor_files import ProcessorClasses
from torchtune_vl.chat._tokenizer import QwenTokenizer
from torchtune_vl.chat._transform import ChatTransform

__all__ = [
    "CHAT_TEMPLATE",
    "ChatTransform",
    "ProcessorClasses",
    "QwenTokenizer",
    "boxes_in_original",
]
