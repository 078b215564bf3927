"""Qwen2.5-VL for torchtune."""

import logging

# torchao warns on import of C++ extensions that it does not load, which nothing here needs
logging.getLogger("torchao").addFilter(lambda record: "cpp extensions" not in record.getMessage())
