"""Bundles for servers of models."""
