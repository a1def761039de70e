"""Checkpoint to bundle: find the weights, trace the blocks, assemble the graphs, stream the tensors."""
