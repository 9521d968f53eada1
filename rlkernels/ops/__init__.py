"""The public functions: their checks, their gradients, and the choice of backend. One file per op; what the linear_ ops
share is in lm_head/."""
