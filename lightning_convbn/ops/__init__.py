"""The arithmetic: the fold, the one convolution, and recipes in the place of saved tensors."""
