"""Lightning data modules for text -> JSON: made-up company messages, and two real data sets from a folder."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator

import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler

from lightning_lora.sft.batching import BATCHING, by_length
from lightning_lora.sft.chat import Example, chat_prompt
from lightning_lora.sft.encoding import Batch, encode
from lightning_lora.sft.messages import company_messages
from lightning_lora.sft.pretrained import SMOLLM2, load_tokenizer
from lightning_lora.sft.records import e2e_example, read_records, snips_example

STAGE_SPLITS = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}


class JSONTask(L.LightningDataModule):
    """Text in, one JSON object out. A subclass says where its examples come from.

    Args:
        pretrained: Whose tokenizer to use; give the same name as to the module.
        instruction: The user's turn, with ``{text}`` where the message goes.
        batch_size: Examples of a training batch.
        eval_batch_size: Examples of a validation or test batch.
        batching: Which examples a training batch gets: ``"by_length"`` those of like length, next to no padding;
            ``"as_drawn"`` any; ``"packed"`` any, several in a row.
        train_size: Examples to train on.
        validation_size: Examples for the validation loss.
        test_size: Examples to answer in a test.
        shots: Solved training examples put before each prompt, to measure prompting without training.
        seed: Of the choice and order of the examples.

    Raises:
        ValueError: A size is below one, ``batching`` is unknown, or ``instruction`` has no ``{text}``.
    """

    def __init__(
        self,
        *,
        pretrained: str = SMOLLM2,
        instruction: str = "{text}\nReply with JSON.",
        batch_size: int = 8,
        eval_batch_size: int = 32,
        batching: str = "by_length",
        train_size: int = 800,
        validation_size: int = 48,
        test_size: int = 100,
        shots: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.instruction = instruction
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.batching = batching
        self.sizes = {"train": train_size, "validation": validation_size, "test": test_size}
        self.shots = shots
        self.seed = seed
        self._batches: dict[str, list[Batch]] = {}
        self._check()

    @abstractmethod
    def examples(self, split: str, size: int) -> list[Example]:
        """Return ``size`` examples of a split (train, validation, test), fewer where there are fewer."""

    def setup(self, stage: str) -> None:
        """Read and encode what the stage needs, once."""
        missing = [split for split in STAGE_SPLITS[stage] if split not in self._batches]
        if not missing:
            return
        tokenizer = load_tokenizer(self.pretrained)
        shots = tuple(self.examples("train", self.shots)) if self.shots else ()
        for split in missing:
            examples = self.examples(split, self.sizes[split])
            prompts = [chat_prompt(example.text, instruction=self.instruction, shots=shots) for example in examples]
            encoded = [encode(p, example.answer, tokenizer) for p, example in zip(prompts, examples, strict=True)]
            if split == "train":
                batches = BATCHING[self.batching](encoded, self.batch_size, tokenizer.pad_token_id)
            else:
                batches = by_length(encoded, self.eval_batch_size, tokenizer.pad_token_id)
            self._batches[split] = batches

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training batches, in a new order each epoch."""
        return self._loader("train", EpochShuffle(len(self._batches["train"]), seed=self.seed))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches, shortest first."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches, shortest first."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test batches."""
        return self._loader("test")

    def _loader(self, split: str, sampler: Sampler[int] | None = None) -> DataLoader[Batch]:
        # The items are whole batches already: batch_size=None hands them out as they are.
        return DataLoader(self._batches[split], batch_size=None, sampler=sampler)  # type: ignore[arg-type]

    def _check(self) -> None:
        counts = {
            **{f"{split}_size": size for split, size in self.sizes.items()},
            "batch_size": self.batch_size,
        }
        counts["eval_batch_size"] = self.eval_batch_size
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}={count} of {type(self).__name__} must be 1 or more.")
        if self.batching not in BATCHING:
            raise ValueError(f"batching={self.batching!r} is unknown; use one of {', '.join(BATCHING)}.")
        if "{text}" not in self.instruction:
            raise ValueError(f"instruction={self.instruction!r} has no {{text}}: say where the message goes.")


class EpochShuffle(Sampler[int]):
    """An order set by seed and epoch alone, so that a resumed run sees what an uninterrupted one would.

    Lightning calls ``set_epoch``.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield each index once."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.size, generator=generator).tolist()

    def __len__(self) -> int:
        """Return the number of items."""
        return self.size


class CompanyMessages(JSONTask):
    """Made-up customer messages -> the company's ticket; see `lightning_lora.sft.messages`."""

    def examples(self, split: str, size: int) -> list[Example]:
        """Write the messages; no download, the same on every machine."""
        return company_messages(split, size, seed=self.seed)


class _RecordedTask(JSONTask):
    """Examples from the gzipped JSON lines of a folder.

    Args:
        data_dir: Folder that holds ``train.jsonl.gz``, ``validation.jsonl.gz`` and ``test.jsonl.gz``.
        **options: As for `JSONTask`.
    """

    def __init__(self, *, data_dir: str, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.data_dir = data_dir

    def examples(self, split: str, size: int) -> list[Example]:
        """Draw from the split's file without replacement, by the seed."""
        records = read_records(self.data_dir, split)
        random.Random(self.seed).shuffle(records)
        return [self.example(record) for record in records[:size]]

    @staticmethod
    @abstractmethod
    def example(record: dict[str, object]) -> Example:
        """Turn a line of the file into an example."""


class SnipsJson(_RecordedTask):
    """Voice-assistant requests (SNIPS) -> ``{"intent": ..., "slots": {...}}``."""

    example = staticmethod(snips_example)


class E2EJson(_RecordedTask):
    """Restaurant descriptions (cleaned E2E) -> their facts as a flat object."""

    example = staticmethod(e2e_example)
