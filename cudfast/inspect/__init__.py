"""What is installed, the machine, and what GPU kernels should take."""
