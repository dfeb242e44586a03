"""FLIP: a language model and a click model, pre-trained to restore masked inputs of each other, then combined.

Source: FLIP (arXiv 2310.19453) and its code. Pre-training has three equal terms: masked text is restored from token
states beside the whole tabular vector; masked fields are restored from the tabular state beside the whole text vector,
by noise-contrastive estimation with 25 values drawn by frequency; both views of a row find each other (symmetric
InfoNCE, temperature 0.7). 15 % of text values (whole ones) and of fields are masked. Fine-tuning trains both on
sigmoid(a z_id + (1 - a) z_text), a learned from 0, and the sum of three cross-entropies.

Different here: the language model is a small sentence encoder; the text is the titles of the target and of the latest
items, numbers are fields but not text; the newest `ROWS` rows are trained on; the language model multiplies in bf16
where the CPU supports it; there is no early stopping on the test split (as in the authors' code).

Letters: B rows, F fields, W tokens, D width of token states, T width of the tabular vector, M masked places, K noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from encoders.arithmetic import computing
from encoders.bert import Bert
from encoders.bundle import DEFAULT_BUNDLE, BundleManifest
from encoders.config import Precision
from trainer.networks.losses import NonFiniteLoss
from trainer.offline.data import CtrData
from trainer.offline.neural.base import SIMILARITIES
from trainer.offline.neural.flip_rows import Fields, TitleTokens, recent

ROWS = 50_000
MASKED = 0.15
NOISE = 25
TEMPERATURE = 0.7
FIELD_WIDTH, TABULAR_WIDTH, SHARED_WIDTH = 16, 128, 64
_NEVER_READ = ("pooler.", "embeddings.position_ids")
"""Heads of names of tensors in a BERT's file that its states do not depend on."""


class Language(Protocol):
    """A language model that can be trained: a module."""

    width: int
    words: nn.Parameter
    """Embeddings of its tokens, (vocabulary, D)."""

    def __call__(self, token_BW: Tensor, mask_BW: Tensor) -> Tensor:
        """Token states, shape (B, W, D)."""
        ...


class TrainableBert(nn.Module):
    """A BERT whose weights are parameters."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._bert = Bert(folder, torch.device("cpu"))
        self.width = self._bert.width
        self.weights = nn.ParameterList()
        for name, tensor in self._bert.weights.items():
            if tensor.is_floating_point() and not name.startswith(_NEVER_READ):
                parameter = nn.Parameter(tensor.clone())
                self._bert.weights[name] = parameter
                self.weights.append(parameter)
                if name == "embeddings.word_embeddings.weight":
                    self.words = parameter
        self._precision: Precision = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"

    def forward(self, token_BW: Tensor, mask_BW: Tensor) -> Tensor:
        """Token states, shape (B, W, D)."""
        # attention in plain products: the gradient of the fused kernel takes half of a step on a CPU
        with computing(token_BW.device, self._precision), sdpa_kernel(SDPBackend.MATH):
            return self._bert(token_BW, mask_BW).float()


class FlipNetwork(nn.Module):
    """Both models, and the heads that restore masked inputs."""

    def __init__(self, sizes: Sequence[int], language: Language) -> None:
        super().__init__()
        self.language: Any = language  # a `Language`; typed as a module it would lose its attributes
        width: int = language.width
        first = np.concatenate([[0], np.cumsum([size + 1 for size in sizes])])  # one more value per field: masked
        self.register_buffer("first_F", torch.from_numpy(first[:-1]), persistent=False)
        self.register_buffer("masked_F", torch.from_numpy(first[1:] - 1), persistent=False)
        self.fields = nn.Embedding(int(first[-1]), FIELD_WIDTH)
        nn.init.normal_(self.fields.weight, std=0.05)
        tabular = len(sizes) * FIELD_WIDTH
        self.tabular = nn.Sequential(
            nn.LayerNorm(tabular), nn.Linear(tabular, TABULAR_WIDTH), nn.ReLU(), nn.Linear(TABULAR_WIDTH, TABULAR_WIDTH)
        )
        self.restore_text = nn.Sequential(nn.Linear(width + TABULAR_WIDTH, width), nn.GELU(), nn.LayerNorm(width))
        self.restore_fields = nn.Linear(TABULAR_WIDTH + width, tabular)
        self.text_side, self.tabular_side = nn.Linear(width, SHARED_WIDTH), nn.Linear(TABULAR_WIDTH, SHARED_WIDTH)
        self.click_text = nn.Linear(width, 1)
        self.click_tabular = nn.Sequential(nn.ReLU(), nn.Linear(TABULAR_WIDTH, 1))
        self.share = nn.Parameter(torch.zeros(()))

    first_F: Tensor
    masked_F: Tensor

    def tabular_vector(self, code_BF: Tensor, hidden_BF: Tensor | None = None) -> Tensor:
        """The click model's state, shape (B, T); `hidden_BF` marks masked fields."""
        place_BF = code_BF + self.first_F
        if hidden_BF is not None:
            place_BF = torch.where(hidden_BF, self.masked_F, place_BF)
        state_BT: Tensor = self.tabular(self.fields(place_BF).flatten(1))
        return state_BT

    def states(self, token_BW: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        """Token states (B, W, D) and their mean over real tokens (B, D)."""
        mask_BW = (token_BW != padding).long()
        state_BWD = self.language(token_BW, mask_BW)
        weight_BW1 = mask_BW[:, :, None].float()
        return state_BWD, (state_BWD * weight_BW1).sum(1) / weight_BW1.sum(1).clamp(min=1)

    def logits(self, token_BW: Tensor, code_BF: Tensor, padding: int) -> Tensor:
        """Joint, id-based and text-based logits, shape (B, 3)."""
        by_text_B = self.click_text(self.states(token_BW, padding)[1]).squeeze(1)
        by_id_B = self.click_tabular(self.tabular_vector(code_BF)).squeeze(1)
        return torch.stack([self.share * by_id_B + (1 - self.share) * by_text_B, by_id_B, by_text_B], dim=1)

    def pretraining_loss(
        self, token_BW: Tensor, code_BF: Tensor, hidden_BW: Tensor, hidden_BF: Tensor, noise_BFK: Tensor,
        log_q_BF: Tensor, log_q_BFK: Tensor, words: TitleTokens,
    ) -> Tensor:  # fmt: skip
        """Masked text, masked fields and alignment, equally weighted. `log_q`: log frequency of values and noise."""
        tabular_BT = self.tabular_vector(code_BF)
        _, text_BD = self.states(token_BW, words.padding)
        loss = alignment(self.text_side(text_BD), self.tabular_side(tabular_BT))
        if hidden_BW.any():
            gapped_BWD, _ = self.states(token_BW.masked_fill(hidden_BW, words.mask), words.padding)
            row_M = hidden_BW.nonzero()[:, 0]
            joined = torch.cat([gapped_BWD[hidden_BW], tabular_BT[row_M]], dim=1)
            loss = loss + F.cross_entropy(self.restore_text(joined) @ self.language.words.T, token_BW[hidden_BW])
        if hidden_BF.any():
            state_BX = torch.cat([self.tabular_vector(code_BF, hidden_BF), text_BD], dim=1)
            wanted_MX = self.restore_fields(state_BX).view(*code_BF.shape, FIELD_WIDTH)[hidden_BF]
            true_M1 = (code_BF + self.first_F)[hidden_BF][:, None]
            noise_MK = (noise_BFK + self.first_F[:, None])[hidden_BF]
            score_MK = torch.einsum("mx,mkx->mk", wanted_MX, self.fields(torch.cat([true_M1, noise_MK], dim=1)))
            log_q_MK = torch.cat([log_q_BF[hidden_BF][:, None], log_q_BFK[hidden_BF]], dim=1)
            loss = loss + noise_contrastive(score_MK, log_q_MK)
        return loss


def noise_contrastive(score_MK: Tensor, log_q_MK: Tensor) -> Tensor:
    """NCE: column 0 is the true value, the others are noise; classified by score - log(noise count x frequency)."""
    logits_MK = score_MK - log_q_MK - math.log(score_MK.shape[1] - 1)
    return (F.softplus(-logits_MK[:, 0]) + F.softplus(logits_MK[:, 1:]).sum(1)).mean()


def alignment(text_BS: Tensor, tabular_BS: Tensor) -> Tensor:
    """Symmetric InfoNCE between the two views of each row, temperature 0.7."""
    cosine_BB = F.normalize(text_BS, dim=1) @ F.normalize(tabular_BS, dim=1).T / TEMPERATURE
    own_B = torch.arange(len(cosine_BB), device=cosine_BB.device)
    return (F.cross_entropy(cosine_BB, own_B) + F.cross_entropy(cosine_BB.T, own_B)) / 2


class Flip:
    """FLIP. One trial only: a fit costs more than all trials of the other models together."""

    name = "flip"
    calibrated = True
    trials: Sequence[Mapping[str, Any]] = ({},)

    def __init__(self, *, language: Language | None = None, folder: Path | None = None) -> None:
        self._language, self._folder = language, folder or language_folder()
        self.batch_rows, self.learning_rate, self.language_rate = 128, 1e-3, 5e-5

    def fit(self, train: CtrData, validation: CtrData | None, *, seed: int, trial: Mapping[str, Any]) -> None:
        """One epoch of pre-training and one of fine-tuning on the newest rows; validation rows are not used."""
        train = train.select(np.arange(max(0, len(train) - ROWS), len(train)))
        rng = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = TitleTokens.of(train.items.titles, self._folder)
            self.fields = Fields.of(train, SIMILARITIES)
            language: Language = self._language if self._language is not None else TrainableBert(self._folder)
            self.network = FlipNetwork(self.fields.sizes, language).train()
            code_NF = self.fields.codes(train)
            frequency = [np.bincount(code_NF[:, f], minlength=size) for f, size in enumerate(self.fields.sizes)]
            log_q = [np.log(np.maximum(count, 0.5) / len(train)).astype(np.float32) for count in frequency]
            self._epoch(train, code_NF, rng, lambda rows, tokens, values: self._pretrain(
                rows, tokens, values, code_NF, log_q, rng))  # fmt: skip
            label_N = torch.from_numpy(train.rows.label_N.astype(np.float32))
            self._epoch(train, code_NF, rng, lambda rows, tokens, values: self._finetune(
                tokens, code_NF[rows], label_N[rows]))  # fmt: skip

    def predict(self, data: CtrData) -> NDArray[np.float64]:
        """Probabilities of the joint logit."""
        self.network.eval()
        code_NF, score_N = self.fields.codes(data), np.empty(len(data))
        with torch.inference_mode():
            for rows, tokens, _ in self._batches(data, np.arange(len(data)), 4 * self.batch_rows):
                logits_B3 = self.network.logits(tokens, torch.from_numpy(code_NF[rows]), self.words.padding)
                score_N[rows] = torch.sigmoid(logits_B3[:, 0].double()).numpy()
        return score_N

    def _epoch(self, data: CtrData, code_NF: NDArray[np.int64], rng: np.random.Generator, loss_of: Any) -> None:
        language = {id(parameter) for parameter in self.network.language.parameters()}
        others = [parameter for parameter in self.network.parameters() if id(parameter) not in language]
        optimiser = torch.optim.AdamW(
            [
                {"params": others, "lr": self.learning_rate},
                {"params": list(self.network.language.parameters()), "lr": self.language_rate},
            ],
            weight_decay=1e-2,
        )
        steps = max(2, -(-len(data) // self.batch_rows))
        steps += steps == 10  # a rise over a tenth of them would take no time, and the schedule divides by it
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, max_lr=[self.learning_rate, self.language_rate], total_steps=steps, pct_start=0.1
        )
        for rows, tokens, values in self._batches(data, self._shuffled(data, rng), self.batch_rows):
            loss = loss_of(rows, tokens, values)
            if not torch.isfinite(loss):
                raise NonFiniteLoss(f"loss is {loss.item()}")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            optimiser.step()
            schedule.step()

    def _shuffled(self, data: CtrData, rng: np.random.Generator) -> NDArray[np.int64]:
        """Rows in random order, with batches of similar length in tokens, so that there is little padding."""
        length_N = self.words.lengths(data.rows.item_N, recent(data))
        order = rng.permutation(len(data))
        order = order[np.argsort(length_N[order], kind="stable")]
        batches = [order[start : start + self.batch_rows] for start in range(0, len(order), self.batch_rows)]
        return np.concatenate([batches[number] for number in rng.permutation(len(batches))])

    def _batches(
        self, data: CtrData, order: NDArray[np.int64], size: int
    ) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
        recent_NR = recent(data)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            tokens, values = self.words.rows(data.rows.item_N[rows], recent_NR[rows])
            yield rows, torch.from_numpy(tokens), torch.from_numpy(values)

    def _pretrain(
        self, rows: NDArray[np.int64], tokens: Tensor, values: Tensor, code_NF: NDArray[np.int64],
        log_q: list[NDArray[np.float32]], rng: np.random.Generator,
    ) -> Tensor:  # fmt: skip
        code_BF = code_NF[rows]
        hidden_BS = torch.from_numpy(rng.random((len(rows), int(values.max()) + 2)) < MASKED)
        hidden_BS[:, -1] = False  # place -1: special tokens
        noise_BFK = code_NF[rng.integers(len(code_NF), size=(len(rows), NOISE))].transpose(0, 2, 1)
        by_field = [(one[code_BF[:, f]], one[noise_BFK[:, f]]) for f, one in enumerate(log_q)]
        return self.network.pretraining_loss(
            tokens,
            torch.from_numpy(code_BF),
            hidden_BS.gather(1, values % hidden_BS.shape[1]),
            torch.from_numpy(rng.random(code_BF.shape) < MASKED),
            torch.from_numpy(np.ascontiguousarray(noise_BFK)),
            torch.from_numpy(np.stack([true for true, _ in by_field], axis=1)),
            torch.from_numpy(np.stack([noise for _, noise in by_field], axis=1)),
            self.words,
        )

    def _finetune(self, tokens: Tensor, code_BF: NDArray[np.int64], label_B: Tensor) -> Tensor:
        logits_B3 = self.network.logits(tokens, torch.from_numpy(code_BF), self.words.padding)
        return (
            F.binary_cross_entropy_with_logits(logits_B3, label_B[:, None].expand(-1, 3), reduction="none")
            .mean(0)
            .sum()
        )


def language_folder() -> Path:
    """Folder of the default bundle's language model."""
    manifest = BundleManifest.model_validate_json((DEFAULT_BUNDLE / "bundle.json").read_text())
    return manifest.text.weights.resolve(DEFAULT_BUNDLE)
