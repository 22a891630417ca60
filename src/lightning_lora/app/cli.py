"""``lightning-lora``: one program, one verb a job. ``train`` is Hydra's, everything else typer's."""

from __future__ import annotations

import sys

from lightning_lora.errors import MissingDependencyError


def main() -> None:
    """Run the command line.

    ``train`` goes to Hydra untouched, before typer could take ``-m`` or ``--help`` for its own.

    Raises:
        SystemExit: At the end of the command, with its exit status.
    """
    try:
        if sys.argv[1:2] == ["train"]:
            from lightning_lora.app.hydra_main import run

            run(sys.argv[2:])
        else:
            from lightning_lora.app.commands import run_commands

            run_commands()
    except MissingDependencyError as error:
        sys.exit(f"lightning-lora: {error}")
