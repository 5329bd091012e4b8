"""From two sweeps to a differentiable loss."""
