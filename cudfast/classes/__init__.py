"""Sets of classes for every class, and the files that hold them."""
