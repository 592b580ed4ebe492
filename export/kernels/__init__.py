"""What the denoiser does between its matrix products, each as one pass over memory.

`reference` says in plain PyTorch what each kernel computes; `triton_kernels` holds the kernels, which need a GPU and
are imported only there. AOTInductor packages them, so whoever serves an engine needs no Triton.
"""
