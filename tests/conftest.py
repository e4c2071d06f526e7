"""What all tests share."""

import torch

# The tests' tensors are tiny: a second thread costs more than it gives, above all where several processes share the cores.
torch.set_num_threads(1)
