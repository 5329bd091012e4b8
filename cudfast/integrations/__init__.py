"""cudfast inside trainers that exist: one module each, imported only when it is asked for."""
