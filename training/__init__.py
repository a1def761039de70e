"""Checkpoints from nothing: a world to draw, a judge of pictures, and the trainer."""
