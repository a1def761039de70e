"""zimg: compile the Qwen-Image and Z-Image families once, run them anywhere without PyTorch.

``zimg.export`` turns a checkpoint into a bundle, ``zimg.runtime`` turns a bundle and a prompt into
a picture, ``zimg.engines`` runs one graph on one backend, ``zimg.plugins`` holds custom operators.
"""

__version__ = "0.1.0"
