"""Search for placements: annealing of the true cost of the tokens, in compiled loops."""
