"""Sets of classes for every class, and their files."""
