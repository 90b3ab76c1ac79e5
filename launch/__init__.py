"""What starts workers, and what tries to break them; the package imports nothing of it."""
