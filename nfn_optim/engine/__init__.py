"""Everything whose cost grows with the number of weights: moments, and the passes over all of them."""
