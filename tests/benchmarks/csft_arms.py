"""The arms of the C-SFT study: what differs from the defaults, by name."""

from __future__ import annotations

from typing import Any

Arm = dict[str, Any]
"""`csft` and `fusion` are settings; `pretrain` runs stage 1 first; `towers` names weaker ones; `only` one modality;
`catalogue` ranks a whole catalogue; `tuning` continues from the default with trained towers."""

PROJECTED = {"time_negatives": 1024, "bank_takes": 8192}
STORED = PROJECTED | {"bank_rows": "stored"}
NAIVE = STORED | {"momentum": 0.0, "bank_age_half_life_steps": 1e9, "bank_warmup_share": 0.0}
BARE = {"category": False, "year": False, "price": False}
"""A catalogue from another source states other attributes: none, then, so that nothing tells its items apart."""

ARMS: dict[str, Arm] = {
    "stage 2 (default)": {},
    "logQ 0 (for click models)": {"csft": {"log_q_strength": 0.0}},
    "logQ 1": {"csft": {"log_q_strength": 1.0}},
    "logQ 1 + bank 1024": {"csft": PROJECTED | {"log_q_strength": 1.0}},
    "bank 1024": {"csft": PROJECTED},
    "bank 1024, momentum rows": {"csft": STORED},
    "bank 1024, naive": {"csft": NAIVE},
    "batch 64": {"csft": {"batch_pairs": 64}},
    "batch 64 + bank 1024": {"csft": PROJECTED | {"batch_pairs": 64}},
    "stage 1 only": {"pretrain": True, "skip_csft": True},
    "stage 1 + 2": {"pretrain": True},
    "no multi-level": {"csft": {"image_level": 0.0, "title_level": 0.0}},
    "no hard negatives": {"csft": {"hard_negatives": False}},
    "no masks": {"csft": {"masks": False}},
    "no attributes": {"fusion": BARE},
    "temperature not learned": {"csft": {"learn_temperature": False}},
    "uncentred, logQ 1": {"csft": {"log_q_strength": 1.0, "centred": False}},
    "tensor fusion": {"fusion": {"kind": "tensor"}},
    "384 + 512 components": {"fusion": {"text_rank": 384, "image_rank": 512}},
    "bank 1024, 384 + 512 components": {"csft": PROJECTED, "fusion": {"text_rank": 384, "image_rank": 512}},
    "SCL": {"scl": True},
    "shuffled content": {"shuffle": True},
    "text only": {"only": "text"},
    "image only": {"only": "image"},
    "weaker text tower": {"towers": ("text",)},
    "weaker image tower": {"towers": ("image",)},
    "both towers weaker": {"towers": ("text", "image")},
}

CATALOGUE_ARMS: dict[str, Arm] = {
    "catalogue": {"catalogue": True, "fusion": BARE},
    "catalogue, bank 1024": {"catalogue": True, "fusion": BARE, "csft": PROJECTED},
    "catalogue, batch 64": {"catalogue": True, "fusion": BARE, "csft": {"batch_pairs": 64}},
    "catalogue, batch 64 + bank 1024": {"catalogue": True, "fusion": BARE, "csft": PROJECTED | {"batch_pairs": 64}},
}

END_TO_END_ARMS: dict[str, Arm] = {
    "end to end: last blocks": {
        "tuning": {"layers": "last_blocks", "learning_rate": 1e-4},
        "csft": {"epochs": 1, "batch_pairs": 256, "learning_rate": 5e-4},
    },
    "the same steps on heads alone": {"tuning": {}, "csft": {"epochs": 1, "batch_pairs": 256, "learning_rate": 5e-4}},
}
