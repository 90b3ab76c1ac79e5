"""The process that torchrun starts: it forks the trainer, watches it and forks it again."""
