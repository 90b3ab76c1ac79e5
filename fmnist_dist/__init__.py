"""A PyTorch DDP training job that can be killed at any time and ends with the same bits."""

__version__ = "0.1.0"
