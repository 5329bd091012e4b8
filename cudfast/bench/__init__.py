"""Times and memory of the losses beside PyTorch's, on the machine at hand: `python -m cudfast bench`.

The benchmarks of the source tree measure with the same modules. shapes: who has how many classes. cases: inputs, and
the ways to call a loss. contestants: what is raced. gate: no time without the right numbers. race: everybody in turns.
memory: peaks. result: what a race found. compare: two results. command: the command line.
"""
