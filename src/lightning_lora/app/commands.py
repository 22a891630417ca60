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

    @app.command()
    def plan(
        model: str = typer.Argument(help="Folder with a config.json, or a name on the Hugging Face hub."),
        rank: int = typer.Option(16, help="Of LoRA."),
        target: list[str] = typer.Option(("all-linear",), help="Preset or pattern of layers; repeatable."),  # noqa: B008
        full: bool = typer.Option(False, "--full", help="No adapters: everything trains."),
        batch: int = typer.Option(1, help="Sequences in a batch."),
        length: int = typer.Option(2048, help="Tokens of a sequence."),
        quantization: str | None = typer.Option(None, help="nf4, fp4 or int8."),
        double_quant: bool = typer.Option(False, "--double-quant", help="Quantize the constants, too."),
        gradient_checkpointing: bool = typer.Option(False, "--gradient-checkpointing", help="Recompute activations."),
        optimizer: str = typer.Option(
            "adamw", help="adamw, adamw_fused, adamw8bit, paged_adamw8bit, paged_adamw, sgd or sgd_momentum."
        ),
        precision: str = typer.Option("bf16-true", help="Lightning's."),
        gpu_gb: float | None = typer.Option(None, help="Memory of the device in GB (10^9 bytes): does it fit?"),
        as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    ) -> None:
        """Plan the memory of a run before anything is allocated."""
        from lightning_lora.app.plan import plan as plan_run

        raise typer.Exit(
            plan_run(
                model,
                rank=rank,
                target_modules=target,
                full=full,
                batch=batch,
                length=length,
                quantization=quantization,
                double_quant=double_quant,
                gradient_checkpointing=gradient_checkpointing,
                optimizer=optimizer,
                precision=precision,
                gpu_gb=gpu_gb,
                as_json=as_json,
            )
        )

    return app
