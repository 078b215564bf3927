"""The parity report: ours beside transformers, on the user's own files."""

from torchtune_vl.validation._html import to_html
from torchtune_vl.validation._inputs import (
    Conversation,
    Inputs,
    find_images,
    find_videos,
    read_conversations,
)
from torchtune_vl.validation._markdown import to_markdown
from torchtune_vl.validation._report import Case, Picture, Report, Row, TokenPair
from torchtune_vl.validation._terminal import print_report
from torchtune_vl.validation._torchvision import import_torchvision
from torchtune_vl.validation._validate import validate

__all__ = [
    "Case",
    "Conversation",
    "Inputs",
    "Picture",
    "Report",
    "Row",
    "TokenPair",
    "find_images",
    "find_videos",
    "import_torchvision",
    "print_report",
    "read_conversations",
    "to_html",
    "to_markdown",
    "validate",
]
