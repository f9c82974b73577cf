"""Predicted times of the GPU kernels from their machine code: see README.md."""
