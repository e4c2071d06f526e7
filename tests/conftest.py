"""What all tests share."""

import torch

# The tests' tensors are tiny: a second thread costs more than it gives, above all on a busy machine.
torch.set_num_threads(1)
