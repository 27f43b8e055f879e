"""Shapes and names: how parameters are read as matrices, and which of them are."""
