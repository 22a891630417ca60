"""What fine-tuning changed: scores and answers before and after, sizes, the merge proof."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_lora.quantized_layer import QuantizedLayer
from lightning_lora.sft.curve import draw_loss_curve, require_matplotlib
from lightning_lora.sft.proof import compare_answers, find_model_folder
from lightning_lora.sft.tables import merge_lines, sample_table, score_table, size_line

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from lightning_lora import LoRACallback
    from lightning_lora.sft.module import SFTModule

SCORES = ("valid_json", "field_f1", "exact_match", "loss")
REPORT_FILE = "report.json"
CURVE_FILE = "loss_curve.png"


@dataclass
class Record:
    """Scores and answers of one test."""

    scores: dict[str, float]
    samples: list[dict[str, str]] = field(default_factory=list)


class BeforeAfterReport:
    """Collects a test before and one after fine-tuning, then prints and writes what changed.

    Args:
        output_dir: Folder of ``report.json`` and ``loss_curve.png``.
        base_name: What to call the base model.
        shown_samples: Answers printed, before and after.
        proof_samples: Answers that a new process repeats with the merged model; None for all, 0 for no proof.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """

    def __init__(
        self,
        output_dir: str,
        *,
        base_name: str = "base",
        shown_samples: int = 3,
        proof_samples: int | None = None,
    ) -> None:
        require_matplotlib()  # now, not after hours of training
        self.output_dir = Path(output_dir)
        self.base_name = base_name
        self.shown_samples = shown_samples
        self.proof_samples = proof_samples
        self.before: Record | None = None
        self.after: Record | None = None
        self._base_bytes = 0
        self._model: SFTModule | None = None

    def record_before(self, model: SFTModule, metrics: Mapping[str, float]) -> None:
        """Keep the test of the base model.

        Args:
            model: The module after its test.
            metrics: What the test logged: ``test/valid_json``, ``test/field_f1``, ``test/exact_match``,
                ``test/loss``.
        """
        self.before = Record(scores=_scores(metrics), samples=list(model.samples))
        self._base_bytes = _base_bytes(model)

    def record_after(self, model: SFTModule, metrics: Mapping[str, float]) -> None:
        """Keep the test of the fine-tuned model; arguments as in `record_before`."""
        self.after = Record(scores=_scores(metrics), samples=list(model.samples))
        self._model = model

    def write(self, *, trainer: L.Trainer, lora: LoRACallback, seconds: float) -> dict[str, Any]:
        """Print the report, draw the loss curve, and write ``report.json``.

        Args:
            trainer: The trainer that fitted.
            lora: The callback, whose ``merge_report`` is proven where there is one.
            seconds: How long the run took so far; the time of the proof is added.

        Returns:
            What ``report.json`` holds.

        Raises:
            RuntimeError: A test before or after is missing.
            MergeError: The merged model could not be opened without this package.
        """
        if self.before is None or self.after is None or self._model is None:
            raise RuntimeError("A before/after report needs record_before and record_after ahead of write.")
        report: dict[str, Any] = {
            "base": self.base_name,
            "before": self.before.scores,
            "after": self.after.scores,
            "test_samples": len(self.after.samples),
            "checkpoint_bytes": _checkpoint_bytes(trainer),
            "base_bytes": self._base_bytes,
            "merge": lora.merge_report.to_dict() if lora.merge_report is not None else None,
            "seconds": round(seconds, 1),
            "samples": self._shown(),
        }
        self._write(report)  # before what may fail
        began = time.perf_counter()
        report["merge"] = self._proven(report["merge"], self._model.max_new_tokens)
        report["seconds"] = round(seconds + time.perf_counter() - began, 1)
        self._write(report)
        draw_loss_curve(self._model.curve, self.output_dir / CURVE_FILE)
        if trainer.is_global_zero:
            self._print(report)
        return report

    def _write(self, report: dict[str, Any]) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / REPORT_FILE
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _proven(self, merge: dict[str, Any] | None, max_new_tokens: int) -> dict[str, Any] | None:
        folder = find_model_folder(Path(merge["folder"])) if merge and merge.get("folder") else None
        samples = self.after.samples[: self.proof_samples] if self.after else []
        if merge is not None and folder is not None and samples:
            merge |= {"model_folder": str(folder)} | compare_answers(folder, samples, max_new_tokens=max_new_tokens)
        return merge

    def _shown(self) -> list[dict[str, str]]:
        """Some messages, from short to long, with the answers before and after."""
        before, after = (record.samples if record else [] for record in (self.before, self.after))
        step = max(1, len(after) // max(1, self.shown_samples))
        pairs = list(zip(before, after, strict=True))[step // 2 :: step][: self.shown_samples]
        return [
            {
                "prompt": new["prompt"],
                "expected": new["expected"],
                "before": old["answer"],
                "after": new["answer"],
            }
            for old, new in pairs
        ]

    def _print(self, report: dict[str, Any]) -> None:
        console = Console()
        console.print(sample_table(report["samples"]))
        console.print(score_table(report))
        console.print(size_line(report))
        for line in merge_lines(report["merge"]):
            console.print(line)
        console.print(f"{report['seconds']:.0f} s in all; {REPORT_FILE} and {CURVE_FILE} are in {self.output_dir}")


def _scores(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(metrics[f"test/{name}"]), 6) for name in SCORES}


def _base_bytes(model: SFTModule) -> int:
    """Bytes of the base's weights, with the constants of quantized ones; a tied tensor counts once, adapters don't."""
    tensors: list[Tensor] = [weight for name, weight in model.named_parameters() if ".adapters." not in name]
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            tensors += module.constants().values()
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _checkpoint_bytes(trainer: L.Trainer) -> int | None:
    callback = trainer.checkpoint_callback
    path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    return Path(path).stat().st_size if path and Path(path).is_file() else None
