"""How theta is made: meta-training of update rules by truncated backprop through unrolled training runs."""
