"""What a run says while it runs: log lines and progress."""
