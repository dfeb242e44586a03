"""The `mimstream` command: a table of commands, each a module that is imported only when it is called."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from schemas.errors import Fenced, Misconfigured, PipelineError, Unavailable
from streams.runtime.files import OF_FILES, file_refusal
from streams.runtime.logs import configure_logging
from streams.runtime.terminal import say
from streams.settings import Settings, load_settings
from streams.stack.config import StackConfig

COMMANDS: dict[str, str] = {
    "demo": "run the whole loop on embedded parts and report what came out",
    "stack": "start, probe and stop an embedded Kafka, Valkey and Milvus Lite",
    "topics": "create and list the topics",
    "index": "encode published items and keep the representation center true",
    "record": "keep users' recent takes ready for serving",
    "bundle": "make an encoder bundle of your own text and image models",
    "pretrain": "adapt an encoder to the platform's own items, pictures to titles",
    "csft": "teach an encoder what users take next, against space-time negatives",
    "evaluate": "compare models on a data-set folder, judged by what came later",
    "train": "learn CiUBM from the live click stream and release it",
    "trainset": "rebuild the exact rows that a release was trained on, and verify them",
    "skew": "compare the features that servers computed with the trainer's own",
    "models": "list what was released, roll back, pin what answers",
    "serve": "answer scores and neighbours over HTTP",
    "replay": "publish a data-set folder through Kafka in event-time order",
    "import": "publish the items of a data-set folder, without behaviours",
    "center": "compare the representation center with the topic of items, and mend it",
    "dead-letters": "list, show, send again and drop what could not be processed",
    "bench": "measure what this machine reaches",
    "forget": "forget a user, in every process and on every replay",
    "check": "test every connection and setting before the start",
    "settings": "list every setting: its value, what gave it that value, its default and meaning",
    "completion": "print a script for the shell that completes commands and options",
}

EXIT_MISCONFIGURED = 2
EXIT_UNAVAILABLE = 3
EXIT_FENCED = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, load the settings, run the command. Returns the process's exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    common, own = split_common(given)
    options = make_parser(own[:1]).parse_args(own, namespace=common)
    configure_logging(options.log_level)
    settings: Settings | None = None
    try:
        if options.command == "completion":
            print(_completion(options.shell))
            return 0
        # `stack` starts and stops what the others use
        stack = None if options.command == "stack" else options.stack_name
        settings = load_settings(
            options.config, given=options.set, stack=stack, find_stack=_stack_values, command=options.command
        )
        return int(import_module(f"streams.commands.{_module_of(options.command)}").run(options, settings))
    except Misconfigured as error:
        return _fail(error, EXIT_MISCONFIGURED)
    except Unavailable as error:
        return _fail(error, EXIT_UNAVAILABLE)
    except Fenced as error:
        return _fail(error, EXIT_FENCED)
    except PipelineError as error:
        return _fail(error, 1)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in OF_FILES or options.log_level == "debug":
            raise
        return _fail(file_refusal(error, settings), EXIT_MISCONFIGURED)
    except KeyboardInterrupt:
        return 130


def split_common(given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of all commands, wherever they stand before a `--`, and the other words in their order."""
    end = given.index("--") if "--" in given else len(given)
    common, others = _common_options().parse_known_args(given[:end])
    return common, [*others, *given[end:]]


def make_parser(loaded: Collection[str]) -> argparse.ArgumentParser:
    """The parser of all words but the common options; only commands in `loaded` pay for their imports."""
    parser = argparse.ArgumentParser(
        prog="mimstream", description="MIM as a stream-processing embedding system", parents=[_common_options()]
    )
    parser.add_argument("--version", action="version", version=f"mimstream {version('mimstream')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary, epilog=_COMMON)
        if name == "completion":
            sub.add_argument("shell", choices=["bash", "zsh", "tcsh"])
        elif name in loaded:
            import_module(f"streams.commands.{_module_of(name)}").add_arguments(sub)
    return parser


_COMMON = "--config, --set, --stack and --log-level belong to all commands: see `mimstream --help`."


def _common_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mimstream", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("options of all commands, before or after the command's name")
    group.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings (else MIM_CONFIG)")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a single setting, as MIM_TOPICS__PREFIX=x. or topics.prefix=x.; wins over all else; can be repeated",
    )
    group.add_argument(
        "--stack",
        dest="stack_name",
        metavar="NAME",
        help="use the embedded stack of this name and nothing else (see `stack up`), whatever file and environment say",
    )
    group.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def _completion(shell: str) -> str:
    import shtab

    return str(shtab.complete(make_parser(COMMANDS), shell))


def _module_of(command: str) -> str:
    return "import_" if command == "import" else command.replace("-", "_")  # `import` is a keyword


def _stack_values(name: str, config: StackConfig) -> dict[str, object]:
    from streams.stack.run import stack_folder, values_in  # not needed against real clusters

    return values_in(stack_folder(name, config))


def _fail(error: PipelineError, status: int) -> int:
    say(f"mimstream: {error}", error=True)
    return status
