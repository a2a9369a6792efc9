"""Ops with a plain-torch reference, a C++ CPU kernel and (later) CUDA kernels under one name each.

`build.load_kernels` compiles and loads the kernels; without it, or where it cannot, the same ops run as plain torch.
"""
