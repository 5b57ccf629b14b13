"""Data sets made: from folders, lists, Parquet and tars, in tasks that may be killed; adopted; verified."""
