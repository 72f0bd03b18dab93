"""Whether several machines can carry out one run: facts of each, and what contradicts what."""
