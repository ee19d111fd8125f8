"""What a run would need, computed before it starts: operations, memory, the bytes of prefetched batches."""
