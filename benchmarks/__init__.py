"""Speed and memory of the losses against PyTorch.

Run with `python -m pytest benchmarks --benchmark-only`; QUICK=1 in the environment asks for a short run.
"""
