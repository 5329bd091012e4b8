"""The losses as differentiable functions, from the two sweeps of a backend."""
