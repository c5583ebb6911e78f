"""Triton kernels of the fused ops, one file per op (see docs/architecture.md)."""
