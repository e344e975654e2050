"""Video-generation models on `vidgen_kernels`, and the command line that measures them."""
