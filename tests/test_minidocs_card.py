"""The data card's pictures, counts and split definitions come from the generator."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from vrag_lib.minidocs import MiniDocs, MiniDocsConfig
from vrag_lib.minidocs_card import split_definitions, write_card

SHIPPED = Path(__file__).parent.parent / "data" / "minidocs"


def test_shipped_split_definitions_are_those_of_the_code():
    assert json.loads((SHIPPED / "splits.json").read_text()) == split_definitions(MiniDocs())
    assert MiniDocs().fingerprint in (SHIPPED / "README.md").read_text()


def test_shipped_pictures_are_small():
    for name in ("pages.png", "sizes.png"):
        assert (SHIPPED / name).stat().st_size < 300_000


def test_card_of_another_collection(tmp_path):
    docs = MiniDocs(MiniDocsConfig(seed=5, train_documents=12, validation_documents=2, test_documents=3))
    write_card(tmp_path, docs)
    card = (tmp_path / "README.md").read_text()
    pages = sum(len(document.plan) for document in docs.documents("test"))
    assert f"| test | 3 | {pages} | 24 |" in card and docs.fingerprint in card
    for name in ("pages.png", "sizes.png"):
        with Image.open(tmp_path / name) as image:
            assert name in card and min(image.size) > 300
