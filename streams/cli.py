"""The `mimstream` command: a table of commands, each a module that is imported only when it is called."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from schemas.errors import Fenced, Misconfigured, PipelineError, Unavailable
from streams.runtime.logs import configure_logging
from streams.runtime.terminal import say
from streams.settings import load_settings

COMMANDS: dict[str, str] = {
    "demo": "run the whole loop on embedded parts and report what came out",
    "stack": "start, probe and stop an embedded Kafka, Valkey and Milvus Lite",
    "topics": "create and list the topics",
    "index": "encode published items and keep the representation center true",
    "record": "keep users' recent takes ready for serving",
    "pretrain": "adapt an encoder to the platform's own items, pictures to titles",
    "csft": "teach an encoder what users take next, against space-time negatives",
    "evaluate": "compare models on a data-set folder, judged by what came later",
    "train": "learn CiUBM from the live click stream and release it",
    "trainset": "rebuild the exact rows that a release was trained on, and verify them",
    "models": "list what was released, roll back, pin what answers",
    "serve": "answer scores and neighbours over HTTP",
    "replay": "publish a data-set folder through Kafka in event-time order",
    "import": "publish the items of a data-set folder, without behaviours",
    "center": "compare the representation center with the topic of items, and mend it",
    "dead-letters": "list, show, send again and drop what could not be processed",
    "bench": "measure what this machine reaches",
    "forget": "forget a user, in every process and on every replay",
    "check": "test every connection and setting before the start",
    "settings": "list every setting with its default and meaning",
}

EXIT_MISCONFIGURED = 2
EXIT_UNAVAILABLE = 3
EXIT_FENCED = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, load the settings, run the command. Returns the process's exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="mimstream", description="MIM as a stream-processing embedding system")
    parser.add_argument("--config", type=Path, help="TOML file with settings (else MIM_CONFIG)")
    parser.add_argument("--stack", dest="stack_name", help="use the embedded stack of this name (see `stack up`)")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in given if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:  # only the called command pays for its imports
            import_module(f"streams.commands.{_module_of(name)}").add_arguments(sub)
    options = parser.parse_args(given)
    configure_logging(options.log_level)
    try:
        settings = load_settings(options.config, endpoints=_endpoints(options.stack_name, options.config))
        return int(import_module(f"streams.commands.{_module_of(options.command)}").run(options, settings))
    except Misconfigured as error:
        return _fail(error, EXIT_MISCONFIGURED)
    except Unavailable as error:
        return _fail(error, EXIT_UNAVAILABLE)
    except Fenced as error:
        return _fail(error, EXIT_FENCED)
    except PipelineError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _module_of(command: str) -> str:
    return "import_" if command == "import" else command.replace("-", "_")  # `import` is a keyword


def _endpoints(stack_name: str | None, config: Path | None) -> dict[str, object] | None:
    """The addresses of the running stack of this name, as nested settings. Raises `Misconfigured` if it is not up."""
    if stack_name is None:
        return None
    from streams.stack.run import endpoints_in, stack_folder  # not needed against real clusters

    return endpoints_in(stack_folder(stack_name, load_settings(config).stack))


def _fail(error: PipelineError, status: int) -> int:
    say(f"mimstream: {error}", error=True)
    return status
