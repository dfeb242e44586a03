"""Offline models by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from schemas.errors import Misconfigured
from trainer.offline.model import CtrModel

# name: "module:factory"; imported on use, so that a missing optional package affects only its own models
MODELS: dict[str, str] = {
    "popularity": "trainer.offline.simple:popularity",
    "dense-only": "trainer.offline.trees:DenseOnly",
    "category-affinity": "trainer.offline.simple:category_affinity",
    "content-knn": "trainer.offline.simple:content_knn",
    "logistic": "trainer.offline.linear:Logistic",
    "trees": "trainer.offline.trees:Trees",
    "ciubm": "trainer.offline.neural.ciubm:Ciubm",
    "din": "trainer.offline.neural.din:Din",
    "din-vectors": "trainer.offline.neural.din:DinVectors",
    "din-vectors-similarities": "trainer.offline.neural.din:DinSimilarities",
    "simtier": "trainer.offline.neural.simtier:SimTier",
    "make": "trainer.offline.neural.simtier:Make",
    "simtier-make": "trainer.offline.neural.simtier:SimTierMake",
    "sa-ta": "trainer.offline.neural.sata:Sata",
    "dmf": "trainer.offline.neural.dmf:Dmf",
    "qarm": "trainer.offline.neural.qarm:Qarm",
    "flip": "trainer.offline.neural.flip:Flip",
}

# not run unless named: only folders with searches have what it scores by
OF_SEARCHES: dict[str, str] = {"tfidf-query": "trainer.offline.query_words:QueryWords"}

# not run unless named
ABLATIONS: dict[str, str] = {
    "ciubm-without-ids": "trainer.offline.neural.ciubm:WithoutIds",
    "ciubm-without-content": "trainer.offline.neural.ciubm:WithoutContent",
    "ciubm-without-fusion": "trainer.offline.neural.ciubm:WithoutFusion",
    "ciubm-without-similarities": "trainer.offline.neural.ciubm:WithoutSimilarities",
    "ciubm-plain-head": "trainer.offline.neural.ciubm:PlainHead",
    "ciubm-without-trees": "trainer.offline.neural.ciubm:WithoutTrees",
}


def create(name: str) -> CtrModel:
    """A fresh model. Raises `Misconfigured` for an unknown name, listing the known ones."""
    known = MODELS | OF_SEARCHES | ABLATIONS
    if name not in known:
        raise Misconfigured(f"there is no model {name!r}; choose from {', '.join(known)}")
    module, factory = known[name].split(":")
    make: Callable[[], CtrModel] = getattr(import_module(module), factory)
    return make()
