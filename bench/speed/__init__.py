"""How fast the losses are, and what their kernels are made of."""
