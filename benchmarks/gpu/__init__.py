"""The parts of `python -m benchmarks.gpu_verify`.

place: the GPU, or the CPU as a stand-in. plan: the steps in order of importance. steps: runs them within the time.
checks, times, sweep, tools: the steps themselves. clocks: how calls are timed. kernels: calls that other programs
watch. warm: compiles beside them. report: what is written. supervise: goes on when a process is lost or hangs.
"""
