"""Fuzz the decoders of untrusted bytes. Each target starts from its corpus, so runs of any length continue it.

    python tests/fuzz/fuzz.py --seconds 60                 # every target for a minute
    python tests/fuzz/fuzz.py pictures items --seconds 3600 --keep

With atheris (extra `fuzz`) coverage guides it and `--keep` adds inputs that reach new code to the corpus; without it,
seeds are mutated at random. Every target runs in a process of its own with a limit of memory, and of time for each
input. An input that breaks one is written to `corpus/TARGET/crash-...`, and the tests run it from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
MEMORY_MB = 4_096
SECONDS_PER_INPUT = 20
MAX_LENGTH = 65_536
DECODING = ("streams.broker", "streams.indexing", "streams.stores", "streams.dead_letters", "streams.training")
"""Modules of streams that decode."""
_INTERESTING = (b"\x00", b"\xff", b"{", b"}", b"[", b"]", b'"', b"\\u0000", b"1e999", b"-1", b"null", b"9" * 30, b"\n")


def seeds(target: str) -> list[bytes]:
    """The corpus of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir()) if path.is_file()]


def mutated(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to eight small changes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(changed) + 1)
        kind = draw.randrange(6)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[at : at + draw.randint(1, 16)]
        elif kind == 2:
            changed[at:at] = draw.choice(_INTERESTING)
        elif kind == 3:
            changed[at:at] = changed[at : at + draw.randint(1, 64)] * draw.randint(1, 20)
        elif kind == 4:
            other = draw.choice(others)
            begin = draw.randrange(len(other) + 1)
            changed[at : at + 32] = other[begin : begin + 32]
        else:
            changed[at:at] = draw.randbytes(draw.randint(1, 8))
    return bytes(changed[:MAX_LENGTH])


def _inputs(target: str, seed: int) -> Iterator[bytes]:
    known, draw = seeds(target), random.Random(seed)
    yield from known
    while True:
        yield mutated(draw.choice(known), known, draw)


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + MEMORY_MB * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _too_long)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"one input took more than {SECONDS_PER_INPUT} s")


def run_plainly(name: str, *, seconds: float, runs: int | None, seed: int) -> int:
    """Mutate seeds until the time or the number of runs is over. Returns the number of inputs."""
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    _limit()
    ends = time.monotonic() + seconds
    for number, data in enumerate(_inputs(name, seed)):
        if number == runs or (runs is None and time.monotonic() > ends):
            return number
        signal.alarm(SECONDS_PER_INPUT)
        try:
            target.feed(data)
        except BaseException:
            crash = CORPUS / name / f"crash-{hashlib.sha256(data).hexdigest()[:16]}"
            crash.write_bytes(data)
            print(f"{name}: {crash} breaks it", file=sys.stderr)
            raise
        finally:
            signal.alarm(0)
    raise AssertionError("mutations never end")


def run_guided(name: str, *, seconds: float, seed: int, keep: bool) -> None:
    """Let atheris search; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["schemas", "encoders", "trainer", *DECODING]):
        from tests.fuzz.targets import TARGETS
    folder = CORPUS / name
    options = [
        sys.argv[0],
        *([str(folder)] if keep else [tempfile.mkdtemp(), str(folder)]),
        f"-max_total_time={max(1, round(seconds))}",
        f"-seed={seed}",
        f"-max_len={MAX_LENGTH}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-artifact_prefix={CORPUS / name}/",
        "-print_final_stats=0",
        "-verbosity=0",
    ]
    atheris.Setup(options, TARGETS[name].feed)
    atheris.Fuzz()


def main() -> int:
    """Run each target in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="by default all")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each target")
    parser.add_argument("--runs", type=int, help="inputs for each target instead of a time; repeatable")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="add inputs that reach new code to the corpus (atheris)")
    parser.add_argument("--plain", action="store_true", help="without atheris, also where it is installed")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        if options.plain:
            count = run_plainly(options.alone, seconds=options.seconds, runs=options.runs, seed=options.seed)
            print(f"{options.alone}: {count} inputs")
        else:
            run_guided(options.alone, seconds=options.seconds, seed=options.seed, keep=options.keep)
        return 0
    plain = options.plain or options.runs is not None or importlib.util.find_spec("atheris") is None
    broken = []
    for name in options.targets or sorted(path.name for path in CORPUS.iterdir()):
        command = [sys.executable, __file__, "--alone", name, "--seconds", str(options.seconds)]
        command += ["--seed", str(options.seed)]
        command += ["--plain"] * plain + ["--keep"] * options.keep
        command += ["--runs", str(options.runs)] if options.runs is not None else []
        if subprocess.run(command, check=False, cwd=HERE.parent.parent).returncode:
            broken.append(name)
    print(f"broken: {', '.join(broken)}" if broken else "nothing broke")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent.parent))
    sys.exit(main())
