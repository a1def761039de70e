"""The arithmetic of a diffusion loop, in numpy: pure functions of arrays and numbers."""
