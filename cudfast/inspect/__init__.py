"""Reports on the installation and the machine, and a model of the times of GPU kernels."""
