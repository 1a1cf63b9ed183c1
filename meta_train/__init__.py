"""Meta-training of update rules by backpropagation or evolution strategies through unrolled training."""
