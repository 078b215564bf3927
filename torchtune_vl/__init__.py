"""Vision-language models for torchtune."""

import logging

# What torchao says on import of C++ extensions that it does not load, and torch of torchao: nothing
# here needs the former, and nobody can act on the latter
_NOISE = ("cpp extensions", "Failed to load", "is an Enum subclass")
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).addFilter(
        lambda record: not any(noise in record.getMessage() for noise in _NOISE)
    )
