"""A run's folder: preparing it, what is written into it while the run trains, and what is read from it at a resume."""
