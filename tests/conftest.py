"""Set-up that every test shares."""

import torch

# one thread per process: tests run beside each other on few cores, and results stay the same to the last digit
torch.set_num_threads(1)
