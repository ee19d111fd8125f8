"""Hard views against random views: arms x seeds, at equal epochs and at equal compute, and the report."""
