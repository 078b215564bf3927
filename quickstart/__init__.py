"""Fine-tunes a small Qwen2.5-VL on handwritten digits, from nothing but PyPI."""
