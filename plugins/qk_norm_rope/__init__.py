"""RMS norm of queries or keys, and their rotation, in one pass."""
