"""The page shows the committed records."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the benchmarks' models are those of transformers")

from benchmarks import tables


def test_the_page_has_the_table_of_the_committed_records():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.with_table(page, tables.markdown(list(tables.read()))) == page


def test_a_row_names_what_is_not_the_default():
    settings = [row.setting for row in tables.read()]
    assert "bf16" in settings
    assert len({(row.shape, row.setting) for row in tables.read()}) == len(settings)


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    tables.draw(list(tables.read()), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
