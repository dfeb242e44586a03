"""Two workers with half a batch each learn what one learns from the whole."""

import subprocess
import sys
from pathlib import Path

import torch

from tests.factories.csft_two_workers import one_of, two_steps
from trainer.csft.workers import Workers


def test_two_workers_have_the_loss_and_the_gradients_of_one(tmp_path):
    command = [sys.executable, "-m", "tests.factories.csft_two_workers"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[4]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    out, meet = tmp_path / "1.pt", tmp_path / "meet"
    with subprocess.Popen([*command, str(meet), str(out)], env=environment) as other:
        first = one_of(2, 0, meet)  # this process is the other worker
        assert other.wait(timeout=120) == 0
    alone = two_steps()
    for together in (first, torch.load(out, weights_only=True)):
        assert together.keys() == alone.keys() and "loss2" in alone
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_shares_cover_all_rows_once_and_differ_by_one_at_most():
    for rows in (0, 1, 7, 8, 9):
        shares = [Workers(rank, 3).share_of(rows) for rank in range(3)]
        assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
        lengths = [share.stop - share.start for share in shares]
        assert max(lengths) - min(lengths) <= 1
