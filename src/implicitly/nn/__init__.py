"""Implicit layers as modules."""
