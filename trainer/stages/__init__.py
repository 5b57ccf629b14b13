"""The pipeline: where the network is cut, in which order stages work, what they send, and the proof of no circle."""
