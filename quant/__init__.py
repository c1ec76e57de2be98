"""The numbers: FP4, FP8 and their block scales. Tensors in, tensors out; no files, no printing."""
