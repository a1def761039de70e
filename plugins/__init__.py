"""Custom operators: each with its definition, its reference and its kernels. None is needed so far."""
