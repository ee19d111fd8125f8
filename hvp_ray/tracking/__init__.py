"""Recording: the journal (the truth), MLflow, figures, the summary."""
