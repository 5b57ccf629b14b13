"""Where a run's figures go: its own lines first, then MLflow, TensorBoard and W&B."""
