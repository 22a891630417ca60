"""Graph: chemprop's `MPNN` (directed message passing) regresses the logP that RDKit computes for real molecules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

chemprop_data = pytest.importorskip("chemprop.data", reason="chemprop is not installed (see requirements-wild.txt)")

import lightning as L  # noqa: E402
import torch  # noqa: E402
from chemprop import models, nn  # noqa: E402
from rdkit.Chem import Crippen, MolFromSmiles  # noqa: E402

from lightning_lora import LoRAConfig  # noqa: E402

LORA = LoRAConfig(rank=2, dropout=0.1, target_modules="all-linear")

MOLECULES = (
    "CCO CCN CCC CCCC CCCCO c1ccccc1 Cc1ccccc1 Oc1ccccc1 Nc1ccccc1 CC(=O)O CC(=O)N CC(C)O CC(C)C C1CCCCC1 C1CCNCC1 "
    "C1COCCN1 c1ccncc1 c1ccoc1 c1ccsc1 CCOC(C)=O CC(=O)Oc1ccccc1C(=O)O Cn1cnc2c1c(=O)n(C)c(=O)n2C CCS CCCl CCBr FC(F)F "
    "CC#N C=CC=C C#CC OCC(O)CO NCC(=O)O CC(N)C(=O)O CSCCC(N)C(=O)O OC(=O)c1ccccc1 Clc1ccccc1 Brc1ccccc1 Fc1ccccc1 "
    "COc1ccccc1 CN(C)C CCN(CC)CC O=C1CCCCC1 O=Cc1ccccc1 CC(=O)c1ccccc1 CCCCCC CCCCCCCC OCCO CC(O)C(=O)O c1ccc2ccccc2c1"
).split()


def build() -> L.LightningModule:
    L.seed_everything(12, verbose=False)
    message_passing = nn.BondMessagePassing(d_h=32, depth=2)
    predictor = nn.RegressionFFN(input_dim=32, hidden_dim=32)
    return models.MPNN(message_passing, nn.MeanAggregation(), predictor, batch_norm=True, warmup_epochs=1, init_lr=1e-3)


def _molecules(first: int, last: int) -> Any:
    points = [
        chemprop_data.MoleculeDatapoint.from_smi(smiles, [Crippen.MolLogP(MolFromSmiles(smiles))])
        for smiles in MOLECULES[first:last]
    ]
    return chemprop_data.build_dataloader(chemprop_data.MoleculeDataset(points), batch_size=8, shuffle=False)


def loaders() -> dict[str, Any]:
    return {"train": _molecules(0, 24), "val": _molecules(24, 32), "test": _molecules(32, 48)}


def outputs(module: L.LightningModule) -> torch.Tensor:
    return module(next(iter(_molecules(40, 48))).bmg)


def reopen(path: Path) -> L.LightningModule:
    return models.MPNN.load_from_checkpoint(path, map_location="cpu")
