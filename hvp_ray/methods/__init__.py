"""Methods: one file each, behind one protocol (`method.py`). Usable in anyone's own training loop, without Ray."""
