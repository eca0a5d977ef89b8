"""Is it well: what `mxfp4-moe doctor` gathers and says, and the self-test of every tile.

The doctor: gather -> Environment -> checks -> findings. `environment.gather` looks at files, the driver and, in a
process of its own, torch; `checks.examine` is a pure function from what was found to findings. Neither imports torch.
"""
