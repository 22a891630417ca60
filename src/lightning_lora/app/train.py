"""One training run, told in the order in which it happens."""

from __future__ import annotations

import time
from pathlib import Path

import lightning as L
from omegaconf import DictConfig

from lightning_lora.app.building import Run, build_loggers, build_run, plain
from lightning_lora.app.distributed import own_process_group
from lightning_lora.app.loggers import closing, log_config
from lightning_lora.app.metrics import chosen_metric, logged_metrics, write_metrics

TEST_WEIGHTS = ("live", "last", "best")


def train(config: DictConfig) -> float | None:
    """Build what the configuration names, fit it, test it, and say how good it got.

    With a ``report`` the model is tested before fit too, and the report is written at the end. Every logger
    is closed before this returns or raises. ``metrics.json`` in ``config.output_dir`` holds what was logged.

    Args:
        config: The composed ``train.yaml``.

    Returns:
        The metric named by ``config.optimized_metric``, or None.

    Raises:
        ValueError: Before the fit, if ``test_weights`` is unknown, or a test is needed that ``test_after_fit=false``
            switches off; after it, if the optimized metric was not logged.
    """
    started = time.perf_counter()
    _check(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    loggers = build_loggers(config)
    with own_process_group(), closing(loggers):
        log_config(loggers, plain(config))
        run = build_run(config, loggers=loggers)
        metrics = _fit_and_test(run, config)
        if run.trainer.is_global_zero:
            seconds = time.perf_counter() - started
            write_metrics(Path(config.output_dir), metrics=metrics, seconds=seconds)
            if run.report is not None:
                run.report.write(trainer=run.trainer, lora=run.lora, seconds=seconds)
        return chosen_metric(metrics, config.optimized_metric)


def _check(config: DictConfig) -> None:
    if config.test_weights not in TEST_WEIGHTS:
        raise ValueError(f"test_weights={config.test_weights!r} is unknown. Choose one of {', '.join(TEST_WEIGHTS)}.")
    if config.test_after_fit:
        return
    if str(config.optimized_metric).startswith("test/"):
        raise ValueError(
            f"optimized_metric={config.optimized_metric!r} is measured by the test that test_after_fit=false switches "
            "off. Set optimized_metric=null, or one of validation such as val/loss."
        )
    if config.get("report") is not None:
        raise ValueError("test_after_fit=false leaves the report without its test after the fit. Set report=null, too.")


def _fit_and_test(run: Run, config: DictConfig) -> dict[str, float]:
    """Fit, with tests around it as the configuration asks; return all that was logged."""
    if run.report is None:
        metrics = _fit(run, config)
        return {**metrics, **_test(run, weights=config.test_weights)} if config.test_after_fit else metrics
    _ = run.lora  # refused now rather than after the training
    # The adapters are there already, and change nothing yet: this is the base model.
    run.report.record_before(run.model, _test(run, weights="live"))
    metrics = _fit(run, config)
    after = _test(run, weights=config.test_weights)
    run.report.record_after(run.model, after)
    return {**metrics, **after}


def _fit(run: Run, config: DictConfig) -> dict[str, float]:
    run.trainer.fit(run.model, datamodule=run.data, ckpt_path=config.ckpt_path)
    return logged_metrics(run.trainer)


def _test(run: Run, *, weights: str) -> dict[str, float]:
    """Test the model as it is, or with a checkpoint's adapters; return the metrics of all its test sets."""
    dry = getattr(run.trainer, "fast_dev_run", False)  # keeps no checkpoint to test
    ckpt_path = None if weights == "live" or dry else weights
    results = run.trainer.test(run.model, datamodule=run.data, ckpt_path=ckpt_path, verbose=run.report is None)
    return {name: float(value) for result in results for name, value in result.items()}
