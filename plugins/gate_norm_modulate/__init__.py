"""What lies between the products of a block: gate, residual, norm, factor and shift, in one pass."""
