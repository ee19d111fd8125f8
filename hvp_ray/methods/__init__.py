"""Methods: one file each, behind one protocol (`method.py`). Usable in your own training loop, without Ray."""
