"""The programs: one file for each subcommand of `hvp-ray`."""
