"""What assemblers accept, instruction by instruction: the code behind `mxfp4-moe probe`.

Data flows one way: variants.toml (what to ask) and assemblers.py (whom) -> run.py (ask) -> matrix.py (show, compare).
kernel.toml is what the tile kernel is made of, and kernel.py asks the same assemblers about that. Standard library
alone (and tomli on Python 3.10): no torch, no GPU, no driver.
"""
