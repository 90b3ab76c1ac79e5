"""The run log, atomic checkpoints and what keeps them whole. Nothing here imports torch."""
