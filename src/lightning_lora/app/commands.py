"""The commands beside ``train``: thin typer functions that print with rich."""

from __future__ import annotations

from typing import Any

from lightning_lora.errors import MissingDependencyError
from lightning_lora.version import __version__


def run_commands() -> None:
    """Hand ``sys.argv`` to typer."""
    build_app()()


def build_app() -> Any:
    """Build the typer app.

    Raises:
        MissingDependencyError: If typer is not installed.
    """
    try:
        import typer
    except ImportError as error:
        raise MissingDependencyError(
            "the lightning-lora commands need typer. Install it with: pip install 'lightning-lora[cli]'"
        ) from error

    app = typer.Typer(name="lightning-lora", no_args_is_help=True, add_completion=False, rich_markup_mode="rich")

    @app.callback(invoke_without_command=True)
    def lightning_lora(
        version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    ) -> None:
        """LoRA for any LightningModule."""
        if version:
            typer.echo(__version__)
            raise typer.Exit

    # Listed for the help only: main() sends it to Hydra before typer is asked.
    @app.command(
        name="train",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )
    def train() -> None:
        """Train by Hydra configs, such as: train experiment=tiny adapter.rank=8 (see: train --help)."""

    return app
