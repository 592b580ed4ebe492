"""What the three components do between their matrix products and convolutions, each as one pass over memory.

`reference` defines in plain PyTorch what each kernel computes; `triton_kernels`, `group_norm` and, for one product on
Hopper, `swiglu` hold the kernels, which need a GPU and are imported only there. AOTInductor packages them, so serving
an engine needs no Triton. `attention` calls a library instead, which serving needs too.
"""
