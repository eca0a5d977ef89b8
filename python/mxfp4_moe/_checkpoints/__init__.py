"""Checkpoints -> prepared weights and back: tensors in files, and how their rows are written."""
