"""``python -m torchtune_vl.cli``."""

from torchtune_vl.cli import main

main()
