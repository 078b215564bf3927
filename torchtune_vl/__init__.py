"""Qwen2.5-VL for torchtune."""
