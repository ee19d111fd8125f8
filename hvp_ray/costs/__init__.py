"""What a run needs, computed before it starts: operations, memory, prefetched bytes, size of the pool."""
