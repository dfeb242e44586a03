"""Two workers with half a batch each learn what one learns from the whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from csft_factories import make_features, make_fusion, make_numbers, make_pairs

from trainer.csft.config import CsftConfig
from trainer.csft.pairs import HardNegatives
from trainer.csft.run import padded
from trainer.csft.trainer import CsftTrainer, take_counts
from trainer.csft.workers import Workers


def two_steps() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = CsftConfig(batch_pairs=33, time_negatives=16, bank_takes=64, bank_warmup_share=0.0)
    features = make_features()
    fusion = make_fusion(features)
    items, numbers = padded(fusion, features), make_numbers()
    pairs = make_pairs(numbers)
    usable = np.arange(len(items)) > 0
    trainer = CsftTrainer(
        config, fusion, items, numbers, total_steps=10, counts=take_counts([p.take for p in pairs]),
        hard_negatives=HardNegatives(np.zeros(len(items), np.int64), usable=usable),
    )  # fmt: skip
    reports = [trainer.step(pairs[start : start + 33]) for start in (0, 33, 66)]
    found = {f"loss{n}": torch.tensor(report.loss) for n, report in enumerate(reports) if report is not None}
    # gradients of the last step: Adam would hide a wrong scale
    grads = {name: p.grad.clone() for name, p in fusion.named_parameters() if p.grad is not None}
    return found | grads


def test_two_workers_have_the_loss_and_the_gradients_of_one(tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, str(here / "csft_two_workers.py")]
    environment = {"PYTHONPATH": f"{here}:{here.parents[1]}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    workers = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "meet"), str(outs[rank])], env=environment)
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    alone = two_steps()
    for out in outs:
        together = torch.load(out, weights_only=True)
        assert together.keys() == alone.keys() and "loss2" in alone
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_shares_cover_all_rows_once_and_differ_by_one_at_most():
    for rows in (0, 1, 7, 8, 9):
        shares = [Workers(rank, 3).share_of(rows) for rank in range(3)]
        assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
        lengths = [share.stop - share.start for share in shares]
        assert max(lengths) - min(lengths) <= 1
