"""Benchmarks: ratios against a peer, both measured in one run."""
