"""Optimized einsums for PyTorch modules."""
