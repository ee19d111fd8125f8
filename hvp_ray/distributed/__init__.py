"""The only place that touches torch.distributed: ranks, collectives, wrapping of models."""
