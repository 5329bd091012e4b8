"""The checked rows of a call, the input of a backend."""
