"""A functional executor of the PTX that nvcc emits for sm_120f, for the instructions that this project's kernels use.

launch.py      what our own host code launches (recorder.py, fake_cudart.cpp)
gemm.py        a tile's GEMM, from operands in plain order to its output; running.py: operators and layers
machine.py     launches, blocks, and the scheduler that lets groups of lanes go on, and copies land, at random
warp.py        lanes that diverge and meet again; what instructions do beyond their registers
translate.py   PTX (parse.py) -> Python functions over arrays of 32 lanes (operands.py); knows instructions by name
scalar.py      instructions of one lane's registers (floats.py); exchange.py: of several lanes'
mma.py         MMAs, computed many at once; fragments.py: which lane's register holds which element
memory.py      what is there, written, aligned; order.py: what happened before what
barriers.py    mbarriers and other barriers; tensor_copy.py: tensor maps and copies that land late
faults.py      what is reported
tiny.py        tiny kernels, for tests of the executor itself
mutants.py     mistakes (mutations.py, moe_mutations.py, router_mutations.py), each of which must be noticed

docs/sm12x-without-sm12x.md says what a run stands for and what it does not.
"""
