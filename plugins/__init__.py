"""Operators of our own: each an ONNX function, whose body is its meaning, with a reference and kernels that are faster.

A graph in a bundle has none of them. An engine that has kernels rewrites its graph when it opens it, and whoever has
none could inline the functions again.
"""
