"""psnb: an open, reproducible study of ParallelSpec (parallel drafters for speculative decoding)."""

__version__ = "0.1.0"
