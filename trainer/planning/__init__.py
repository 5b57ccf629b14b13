"""What a run will need and cost, before it starts: memory, step time and money of every layout. No torch."""
