"""What several tests share: a corpus and a retriever without files or models."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vrag_lib.geometry import Size
from vrag_lib.retrieval import Hit, rank_hits


class FakePage:
    """A page whose image is computed, each pixel telling its place: red = x, green = y (modulo 256)."""

    def __init__(self, page_id: str, size: Size):
        self.id = page_id
        self.size = size
        self.text = f"text of {page_id}"

    def open_image(self) -> Image.Image:
        x = Image.linear_gradient("L").rotate(90).resize((self.size.width, self.size.height))
        y = Image.linear_gradient("L").resize((self.size.width, self.size.height))
        return Image.merge("RGB", (x, y, Image.new("L", x.size, 64)))


class FakeCorpus:
    def __init__(self, sizes: Sequence[Size]):
        self.pages = tuple(FakePage(f"doc_{i + 1}", size) for i, size in enumerate(sizes))
        self.page_ids = tuple(page.id for page in self.pages)

    def page(self, page_id: str) -> FakePage:
        return next(page for page in self.pages if page.id == page_id)


class FakeRetriever:
    """Ranks pages by how often the query names their number; remembers what it was asked."""

    name = "fake"

    def __init__(self, page_ids: Sequence[str]):
        self.page_ids = tuple(page_ids)
        self.calls: list[list[str]] = []

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.calls.append(list(queries))
        numbers = [page_id.rsplit("_", 1)[1] for page_id in self.page_ids]
        return [rank_hits(self.page_ids, [query.count(n) for n in numbers], k) for query in queries]


class FailingRetriever(FakeRetriever):
    name = "failing"

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        raise ConnectionError("the search server is away")
