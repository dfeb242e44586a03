"""One of two workers: trains two steps and writes what came out. Started by the test of gathering."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.factories.csft import make_csft_trainer, make_features, make_fusion, make_numbers, make_pairs
from trainer.csft.config import CsftConfig
from trainer.csft.run import padded


def main() -> None:
    """The second worker. Arguments: rendezvous file, output file."""
    torch.set_num_threads(1)
    torch.save(one_of(2, 1, Path(sys.argv[1])), sys.argv[2])


def one_of(count: int, rank: int, meet: Path) -> dict[str, torch.Tensor]:
    """What this process trains as one of so many workers."""
    patience = timedelta(seconds=200)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=count, timeout=patience)
    try:
        return two_steps()
    finally:
        dist.destroy_process_group()


def two_steps() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = CsftConfig(batch_pairs=33, time_negatives=16, bank_takes=64, bank_warmup_share=0.0)
    features = make_features()
    fusion = make_fusion(features)
    items, numbers = padded(fusion, features), make_numbers()
    pairs = make_pairs(numbers)
    trainer = make_csft_trainer(config, fusion, items, numbers, pairs)
    reports = [trainer.step(pairs[start : start + 33]) for start in (0, 33, 66)]
    found = {f"loss{n}": torch.tensor(report.loss) for n, report in enumerate(reports) if report is not None}
    # gradients of the last step: Adam would hide a wrong scale
    grads = {name: p.grad.clone() for name, p in fusion.named_parameters() if p.grad is not None}
    return found | grads


if __name__ == "__main__":
    main()
