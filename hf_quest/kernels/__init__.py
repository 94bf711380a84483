"""The CUDA kernels as operators, and how they are built."""
