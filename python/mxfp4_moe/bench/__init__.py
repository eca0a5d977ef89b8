"""What `mxfp4-moe bench` and `mxfp4-moe tune` are made of: a layer's shape, its floors, clocks, rivals, and reports.

Pure parts (shapes, floors, statistics, kernel_records, report, picture) import no torch and are tested on the CPU. The
layer is timed through the public API, and single kernels by the records that the GPU's profiler writes, so that nothing
here depends on how the layer is cut into kernels.
"""
