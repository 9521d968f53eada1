"""The public functions: their checks, their gradients, and the choice of backend. One file per op."""
