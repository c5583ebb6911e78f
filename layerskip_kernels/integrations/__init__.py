"""Interfaces of other packages to these kernels: Transformers, lm-evaluation-harness, Ray.

Each module imports its library only when used.
"""
