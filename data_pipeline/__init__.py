"""What a model is trained on: shards on disk, the order of their samples, and the stream of batches."""
