"""Estimates of what a run needs, made before it starts: operations, memory, prefetched bytes, size of the pool."""
