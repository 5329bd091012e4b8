"""Where a gain of CUD comes from, and where there is none: ten methods, three data sets, paired intervals."""
