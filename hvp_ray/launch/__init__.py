"""Start a run: the driver, trainers and placement on Ray, or a run without Ray."""
