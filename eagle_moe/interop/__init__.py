"""Foreign checkpoints in: official Eagle releases, and the original weights of experts."""
