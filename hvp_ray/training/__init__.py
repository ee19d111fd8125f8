"""The training algorithm: the step, the loop around it, and their parts. It knows no run folder, no Ray and no MLflow."""
