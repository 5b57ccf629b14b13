"""What watches a run: the guard and its verdicts, requests to stop, where the time went, faults made on purpose."""
