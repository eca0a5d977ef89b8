"""The computation behind arithmetic.py: operands, steps of MMAs that align products or groups, and GEMMs of steps."""
