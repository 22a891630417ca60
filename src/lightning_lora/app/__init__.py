"""The command line and its Hydra app. Hydra and typer are imported where they are used, never here."""
