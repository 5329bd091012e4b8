"""cudfast in other libraries' trainers: one module for each, imported only by the user."""
