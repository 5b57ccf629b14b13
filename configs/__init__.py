"""What a run is: frozen dataclasses, recipes, and their resolution. Standard library only."""
