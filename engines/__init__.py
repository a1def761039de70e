"""What runs one graph: the bundle on disk, and one file per backend, imported when it is asked for."""
