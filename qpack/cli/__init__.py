"""The ``qpack`` program. A file here is a command: it parses, calls one function, prints its
report; nothing is decided here.

A command is imported when it is asked for, so that ``qpack verify`` does not wait for what ``qpack train`` needs.

Reports go to stdout, progress and errors to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import sys
from importlib import import_module

import click

import qpack
from qpack.errors import QpackError

_COMMANDS = ("convert", "verify", "inspect", "estimate", "data", "train", "serve", "adapters", "keys", "merge", "demo")
"""In the order of a model's life."""


class _Commands(click.Group):
    """The commands, each in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name all of them, for ``--help``."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one of them."""
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"qpack.cli.{cmd_name}"), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(qpack.__version__, prog_name="qpack")
def cli() -> None:
    """Take a Hugging Face checkpoint through its whole 4-bit life: pack, fine-tune, serve, merge."""


def main() -> None:
    """Run the program and exit with its status."""
    try:
        status = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except QpackError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: this command needs qpack with the extra cpu or cuda (demo: and demo)")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    for line in message.splitlines():
        click.echo(f"error: {line}", err=True)
    sys.exit(1)
