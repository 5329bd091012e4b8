"""String -> language on CLDR display names: two teachers, five students, one report."""
