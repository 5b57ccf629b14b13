"""Scores on held-out data, each sample once, and the pictures a report shows."""
