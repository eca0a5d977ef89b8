"""What is installed and what is wrong with it, for `mxfp4-moe doctor`: gather -> Environment -> checks -> findings.

`environment.gather` looks at files, the driver and, in a process of its own, torch; `checks.examine` is a pure function
from what was found to findings. Neither imports torch.
"""
