"""A run's folder as one page that needs nothing else: read, drawn and written here. No torch."""
