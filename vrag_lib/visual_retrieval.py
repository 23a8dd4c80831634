"""Search over page images with a ColPali-family model: the visual retriever of the paper (ColQwen2, MaxSim).

Deviations from the released search engine: scores are exact and ties ordered by page id (`maxsim`), where the release
sums in bf16; embeddings are kept as safetensors, where it writes JSON lists per page; every load checks that the
model's weights arrived and that pages do not all look alike (trap S13: with newer llama-index versions every page got
the embedding of the same image).

Embeddings are cached one file per page image, under the content of the image, the model's weights, the library
versions and the engine: a killed build goes on where it stopped, corpora that share pages share their embeddings, and
nothing stale is ever reused. An index folder joins those of one corpus in one memory-mapped file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from vrag_lib import config
from vrag_lib.maxsim import EmbeddingStore, id_order, merge_stores, rank
from vrag_lib.page_encoder import ByaldiEncoder, PageEncoder, load_encoder
from vrag_lib.rendering import write_atomically
from vrag_lib.retrieval import Hit, RetrievalIndexError

if TYPE_CHECKING:
    from vrag_lib.corpus import Corpus, Page

logger = logging.getLogger(__name__)

INDEX_FORMAT = 1
_MANIFEST = "index.json"
_EMBEDDINGS = "embeddings.safetensors"
_REMEDY = "build it again with overwrite=True, or name another index_dir"


class VisualRetriever:
    """Ranks pages by exact MaxSim between query tokens and page tokens. Make one with `build` or `load`.

    store: the embeddings, in the order of `page_ids`. threads: for scoring; None for one per core.
    """

    def __init__(
        self, encoder: PageEncoder, store: EmbeddingStore, page_ids: Sequence[str], threads: int | None = None
    ) -> None:
        self.encoder = encoder
        self.store = store
        self.page_ids = tuple(page_ids)
        self.threads = threads
        self._tie_order = id_order(self.page_ids)
        self.name = f"visual:{encoder.name}"

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        model: str | Path,
        index_dir: str | Path | None = None,
        *,
        engine: str = "byaldi",
        device: str = "auto",
        dtype: str = "bfloat16",
        batch_size: int = 8,
        overwrite: bool = False,
        cache_dir: str | Path | None = None,
        threads: int | None = None,
    ) -> VisualRetriever:
        """Encode the pages of a corpus that are not in the cache yet, and write or open their index.

        model: folder or hub id of a ColPali, ColQwen2 or ColQwen2.5 checkpoint.
        index_dir: where the index lies; without it, a folder of the cache named after corpus, model and engine.
        engine: "byaldi" (RAGMultiModalModel, one page at a time) or "native" (batches of `batch_size`); both give the
        same embeddings. device: "auto", "cpu" or "cuda". dtype: "bfloat16", with the native engine also "float32".
        cache_dir: default `config.cache_dir()`.

        An index that is there already and fits is opened. Two processes that build one index take turns.

        Raises ModelError for an unusable checkpoint; RetrievalIndexError for an index in `index_dir` of another
        model, version or corpus (unless `overwrite`), and for embeddings that are broken.
        """
        encoder = load_encoder(model, engine, device, dtype, batch_size)
        return cls.from_encoder(corpus, encoder, index_dir, overwrite=overwrite, cache_dir=cache_dir, threads=threads)

    @classmethod
    def from_encoder(
        cls,
        corpus: Corpus,
        encoder: PageEncoder,
        index_dir: str | Path | None = None,
        *,
        overwrite: bool = False,
        cache_dir: str | Path | None = None,
        threads: int | None = None,
    ) -> VisualRetriever:
        """As `build`, with an encoder that is loaded already."""
        cache = Path(cache_dir) if cache_dir is not None else config.cache_dir()
        manifest = _manifest(corpus, encoder)
        if index_dir is None:
            index_dir = cache / "visual" / _key(manifest)
        index_dir = Path(index_dir)
        index_dir.mkdir(parents=True, exist_ok=True)
        with _locked(index_dir / ".lock", f"the index in {index_dir}"):
            complete = (index_dir / _MANIFEST).exists() and (index_dir / _EMBEDDINGS).exists()
            if complete and not overwrite:
                _check_manifest(index_dir, manifest)
            else:
                _build_index(corpus, encoder, index_dir, cache, manifest)
        return cls._open(encoder, index_dir, manifest, threads)

    @classmethod
    def load(
        cls,
        index_dir: str | Path,
        model: str | Path,
        corpus: Corpus | None = None,
        *,
        device: str = "auto",
        threads: int | None = None,
    ) -> VisualRetriever:
        """Open the index in a folder, with the model it was built with; `corpus`, if given, must be its corpus.

        Raises RetrievalIndexError, naming the difference and the remedy, when the folder holds no index or one of
        another model, version or corpus; ModelError for an unusable checkpoint.
        """
        index_dir = Path(index_dir)
        _check_manifest(index_dir, {"format": INDEX_FORMAT})
        found = _read_manifest(index_dir)
        encoder = load_encoder(model, found["engine"], device, found["dtype"])
        expected = _encoder_entries(encoder)
        if corpus is not None:
            expected["corpus"] = corpus.fingerprint
        _check_manifest(index_dir, expected)
        return cls._open(encoder, index_dir, found, threads)

    @classmethod
    def _open(
        cls, encoder: PageEncoder, index_dir: Path, manifest: dict[str, Any], threads: int | None
    ) -> VisualRetriever:
        store = EmbeddingStore.load(index_dir / _EMBEDDINGS)
        if len(store) != len(manifest["page_ids"]):
            raise RetrievalIndexError(
                f"{index_dir} holds {len(store)} pages, not {len(manifest['page_ids'])}; {_REMEDY}"
            )
        check_distinct(((manifest["images"][i], store.page(i)) for i in _sample(len(store), 32)), str(index_dir))
        return cls(encoder, store, manifest["page_ids"], threads)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The best `k` pages for each query, by exact score, ties by page id."""
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[Hit]:
        order, scores = rank(self.encoder.encode_query(query), self.store, k, self._tie_order, self.threads)
        return [Hit(self.page_ids[i], float(score)) for i, score in zip(order, scores, strict=True)]

    def search_with_byaldi(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """byaldi's own search over the same embeddings, for comparison: bf16 scores, ties in no particular order.

        Raises RetrievalIndexError when the index was built by the native engine.
        """
        if not isinstance(self.encoder, ByaldiEncoder):
            raise RetrievalIndexError("byaldi's search needs an index built with engine='byaldi'")
        found = []
        for query in queries:
            pages = (self.store.page(i) for i in range(len(self.store)))
            results = self.encoder.search(query, pages, k)
            found.append([Hit(self.page_ids[i], score) for i, score in results])
        return found


def check_distinct(embeddings: Iterable[tuple[str, np.ndarray]], where: str) -> None:
    """Raise RetrievalIndexError when different images have the same embeddings (trap S13), or some are not finite.

    embeddings: pairs of an image's content hash and its embeddings.
    """
    digests: dict[str, bytes] = {}
    for image, array in embeddings:
        if not np.isfinite(array).all():
            raise RetrievalIndexError(f"{where}: embeddings of image {image[:12]} are not finite; is the model broken?")
        digests[image] = hashlib.blake2b(np.ascontiguousarray(array)).digest()
    distinct = len(set(digests.values()))
    if len(digests) > 1 and distinct <= len(digests) / 2:
        raise RetrievalIndexError(
            f"{where}: {len(digests)} different page images have only {distinct} different embeddings; the model "
            "does not see the pages. Check the checkpoint and the pinned library versions"
        )


def _build_index(corpus: Corpus, encoder: PageEncoder, index_dir: Path, cache: Path, manifest: dict[str, Any]) -> None:
    if not corpus.pages:
        raise RetrievalIndexError("the corpus has no pages to index")
    images = manifest["images"]
    pages = dict(zip(images, corpus.pages, strict=True))  # one page for each different image
    folder = cache / "embeddings" / _key(_encoder_entries(encoder))
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock", f"the embeddings in {folder}"):
        encode_missing(pages, encoder, folder)
        files = [folder / f"{image}.safetensors" for image in images]
        sample = _sample(len(files), 1024)
        check_distinct(((images[i], EmbeddingStore.load(files[i]).page(0)) for i in sample), encoder.name)
        (index_dir / _MANIFEST).unlink(missing_ok=True)  # from here on, the old index is no more
        merge_stores(files, index_dir / _EMBEDDINGS)
    write_atomically(index_dir / _MANIFEST, json.dumps(manifest, indent=1).encode())


def encode_missing(pages: dict[str, Page], encoder: PageEncoder, folder: Path) -> None:
    """Encode the pages, by image hash, whose file `{hash}.safetensors` is not in `folder`; each is written at once."""
    hashes = {page.id: image for image, page in pages.items()}
    missing = [page for image, page in pages.items() if not (folder / f"{image}.safetensors").exists()]
    if not missing:
        return
    done = encoder.encode_pages(missing)
    for page, array in tqdm(done, desc="encoding pages", unit="page", total=len(missing)):
        try:
            store = EmbeddingStore.from_pages([array], encoder.dtype)
        except ValueError as error:
            raise RetrievalIndexError(
                f"{encoder.name} gave unusable embeddings for page {page.id!r}: {error}"
            ) from error
        store.save(folder / f"{hashes[page.id]}.safetensors")


def _encoder_entries(encoder: PageEncoder) -> dict[str, Any]:
    return {
        "format": INDEX_FORMAT,
        "engine": encoder.engine,
        "dtype": encoder.dtype,
        "model": encoder.fingerprint,
        "versions": encoder.versions,
    }


def _manifest(corpus: Corpus, encoder: PageEncoder) -> dict[str, Any]:
    """What an index is: its encoder and its corpus, with the content hash of every page image."""
    images = []
    for page in corpus.pages:
        with open(page.image_path, "rb") as file:
            images.append(hashlib.file_digest(file, "sha256").hexdigest())
    return {
        **_encoder_entries(encoder),
        "model_name": encoder.name,
        "corpus": corpus.fingerprint,
        "page_ids": list(corpus.page_ids),
        "images": images,
    }


def _sample(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most), dtype=int)).tolist()


def _key(entries: dict[str, Any]) -> str:
    """A folder name that differs where the entries differ."""
    text = json.dumps({key: value for key, value in entries.items() if key != "model_name"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _read_manifest(index_dir: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((index_dir / _MANIFEST).read_text())
        if not {"engine", "dtype", "format", "page_ids", "images"} <= manifest.keys():
            raise ValueError("entries are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise RetrievalIndexError(
            f"{index_dir} holds no visual index ({error}); build one with VisualRetriever.build"
        ) from error
    return manifest


def _check_manifest(index_dir: Path, expected: dict[str, Any]) -> None:
    found = _read_manifest(index_dir)
    meaning = {
        "format": "another version of this package",
        "engine": "another engine",
        "dtype": "another number format",
        "model": f"another model ({found.get('model_name')})",
        "versions": "other library versions",
        "corpus": "another corpus",
    }
    for key, words in meaning.items():
        if key in expected and found.get(key) != expected[key]:
            was, now = found.get(key), expected[key]
            raise RetrievalIndexError(f"the index in {index_dir} was built with {words}: {was}, now {now}; {_REMEDY}")


@contextlib.contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; says so in the log when another process has it and waits for it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is building %s; waiting for it", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
