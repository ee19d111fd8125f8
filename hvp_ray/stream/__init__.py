"""The pool of view workers and the trainer's stream of batches."""
