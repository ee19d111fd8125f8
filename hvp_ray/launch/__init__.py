"""Everything that starts processes: the driver, trainers, view workers' placement, and runs without Ray."""
