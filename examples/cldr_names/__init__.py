"""String -> language on CLDR display names: two teachers, six students, one report."""
