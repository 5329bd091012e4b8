"""What a backend is given: the rows of a call, checked."""
