"""Memory that a keeper shares with its trainers, so that a trainer's death loses nothing."""
