"""Where a network is trained: submission and supervision on SLURM. Imports `configs` only, never torch."""
