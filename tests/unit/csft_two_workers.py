"""One of two workers: trains two steps and writes what came out. Started by the test of gathering."""

import sys

import torch
import torch.distributed as dist


def main() -> None:
    """Arguments: rank, count, rendezvous file, output file."""
    rank, count, place, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=count)
    from test_csft_gathering import two_steps

    torch.save(two_steps(), out)
    if count > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
