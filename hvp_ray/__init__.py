"""Hard View Pretraining (Ferreira et al., ICLR 2025) on a Ray cluster.

Nothing is imported here: the deterministic core (`config`, `randomness`, `views.plan`, `data.order`)
must stay usable without torch, Ray, DALI or MLflow.
"""

__version__ = "0.1.0"
