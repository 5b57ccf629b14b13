"""How a network is trained: the road (`train.py`), the engine, checkpoints, figures, and the command line."""
