"""What survives a run's processes: checkpoints written, verified, kept, found again, and taken elsewhere."""
