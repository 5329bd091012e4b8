"""Times and memory of the losses beside PyTorch's, on the machine at hand: `python -m cudfast bench`.

The benchmarks of the source tree measure with the same modules. shapes: rows and classes of typical tasks. cases:
inputs, and the ways to call a loss. contestants: the implementations that are timed. gate: the comparison with float64
before a time is taken. race: timing in turns. memory: peaks. result: the measurements. compare: two results. command:
the command line.
"""
