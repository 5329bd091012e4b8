"""An interpreter of PTX: runs on a CPU what nvcc and Triton's compiler made of the kernels for sm_90.

parse.py reads a module; machine.py runs the threads of a cluster as numpy lanes, warps together or one at a time in
random order; instructions.py computes values; memory.py holds what threads share, and raises a `HazardError` where no
barrier orders an access, or a copy was not waited for; launch.py brings the launches of both backends here.

Not covered: SASS and ptxas, the memory model, races in global memory, speed, the true error of ex2.approx.
"""
