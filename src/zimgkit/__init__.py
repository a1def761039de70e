"""zimgkit: compile the Qwen-Image and Z-Image families once, run them anywhere without PyTorch.

``zimgkit.export`` turns a checkpoint into a bundle, ``zimgkit.runtime`` turns a bundle and a prompt into
a picture, ``zimgkit.engines`` runs one graph on one backend, ``zimgkit.plugins`` holds custom operators.
"""

__version__ = "0.1.0"
