"""The algorithm of a run: a step, the loop around it, and what it is built from. No files, no Ray, no MLflow."""
