"""The training algorithm: the step, the loop around it, and their parts. It uses no run folder, Ray or MLflow."""
