"""Page retrieval by text: BM25, dense passages, and the fusion of both that is the offline default.

What is indexed is `Page.text`: the PDF's text layer, or OCR, whichever the corpus carries. Each page also gets its
document's lead, the first 20 words of the document: a question names "the Pew report" or "the refrigerator manual",
which the page that answers it hardly ever does.

Pages are longer than a small encoder's window and its attention span, so the dense index holds passages of 100 words
(the size of DPR, arXiv 2004.04906 §4.1) that overlap by 25, each behind its document's lead, and a page scores as its
best passage (MaxP, Dai & Callan, SIGIR 2019).

Chinese and Japanese are written without spaces: BM25 takes each two neighbouring characters for a word, passages count
each character as one. The models inside are of English, so other languages are found by their words alone.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tqdm import tqdm

from vrag_lib.config import cache_dir as default_cache_dir
from vrag_lib.corpus import Corpus
from vrag_lib.hybrid import RerankRetriever, ScoreFusionRetriever
from vrag_lib.rendering import write_atomically
from vrag_lib.retrieval import Hit, Retriever, rank_hits
from vrag_lib.text_models import CrossEncoder, SentenceEncoder, load_model, well_formed

logger = logging.getLogger(__name__)

LEAD_WORDS = 20
PASSAGE_WORDS = 100
PASSAGE_OVERLAP = 25
RERANK_DEPTH = 10
_CJK = "\u3040-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CJK_RUN, _CJK_CHARACTER = re.compile(f"(?<!\\d)(\\d{{0,9}})([{_CJK}]+)"), re.compile(f"([{_CJK}])")
_BLOCK_PASSAGES = 64
"""Passages of one document that are encoded, and cached, together: what a killed run can lose."""


def document_leads(document_ids: Sequence[str], texts: Sequence[str], words: int = LEAD_WORDS) -> list[str]:
    """For each page the first words of its document: those of its first page that has at least three.

    `document_ids` and `texts` are parallel, one entry per page, pages of a document in order.

    >>> document_leads(["a", "a", "b"], ["", "Annual  report 2015 of us", "Manual"], words=3)
    ['Annual report 2015', 'Annual report 2015', '']
    """
    leads: dict[str, str] = {}
    for document_id, text in zip(document_ids, texts, strict=True):
        split = _words(text)
        if document_id not in leads and len(split) >= 3:
            leads[document_id] = " ".join(split[:words])
    return [leads.get(document_id, "") for document_id in document_ids]


def split_passages(text: str, words: int = PASSAGE_WORDS, overlap: int = PASSAGE_OVERLAP) -> list[str]:
    """Windows of `words` words, neighbours sharing `overlap`; the last one may be shorter. None for no words.

    >>> split_passages("a b c d e f g", words=4, overlap=1)
    ['a b c d', 'd e f g']
    """
    if not 0 <= overlap < words:
        raise ValueError(f"overlap must be at least 0 and below words, not {overlap} and {words}")
    split = _words(text)
    starts = range(0, max(1, len(split) - overlap), words - overlap) if split else []
    return [" ".join(split[start : start + words]) for start in starts]


def _in_pairs(text: str) -> str:
    """Runs of Chinese and Japanese characters as their pairs, which overlap; a number before one, as of a month, is
    a word with its first character and by itself."""

    def words(run: re.Match[str]) -> str:
        number, characters = run.groups()
        pairs = [a + b for a, b in pairwise(characters)]
        return f" {' '.join([number + characters[0], number, *pairs] if number else pairs or [characters])} "

    return _CJK_RUN.sub(words, text)


def _words(text: str) -> list[str]:
    """The words of a text, each Chinese or Japanese character one."""
    return _CJK_CHARACTER.sub(r" \1 ", text).split()


class BM25Retriever:
    """BM25 (bm25s' defaults: Lucene's variant, k1 1.5, b 0.75) over English stems, English stop words left out.

    `leads`, one per page, are indexed with the pages. `stem=False` matches words as they are.
    """

    def __init__(
        self,
        page_ids: Sequence[str],
        texts: Sequence[str],
        leads: Sequence[str] | None = None,
        stem: bool = True,
        name: str = "bm25",
    ) -> None:
        import bm25s

        leads = _checked_leads(page_ids, texts, leads)
        self.page_ids = tuple(page_ids)
        self.name = name
        self._stem = stem
        tokens = self._tokenize([f"{text} {lead}" for text, lead in zip(texts, leads, strict=True)])
        self._index = None
        if any(tokens):  # bm25s cannot index a collection without words
            logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG when it is imported
            self._index = bm25s.BM25()
            self._index.index(tokens, show_progress=False)

    @classmethod
    def from_corpus(cls, corpus: Corpus, lead: bool = True, stem: bool = True, name: str = "bm25") -> BM25Retriever:
        """Over the text that the corpus' pages carry."""
        texts, leads = _page_texts(corpus)
        return cls(corpus.page_ids, texts, leads if lead else None, stem, name)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query the best `k` pages; pages that share no word with it score 0."""
        return [rank_hits(self.page_ids, self._scores(query), k) for query in queries]

    def _scores(self, query: str) -> np.ndarray:
        tokens = self._tokenize([query])[0]
        if self._index is None or not tokens:
            return np.zeros(len(self.page_ids))
        return self._index.get_scores(tokens)

    def _tokenize(self, texts: list[str]) -> list[list[str]]:
        import bm25s
        import Stemmer

        stemmer = Stemmer.Stemmer("english") if self._stem else None
        texts = [_in_pairs(unicodedata.normalize("NFC", well_formed(text))) for text in texts]
        return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


class DenseRetriever:
    """Cosine of bge-small-en-v1.5 vectors; a page scores as its best passage, a page without text as the worst page.

    Vectors are cached under `<cache>/text/` by model and content, in blocks of at most 64 passages of one document, so
    that a killed run goes on where it stopped and a changed document costs only itself. `encoded` counts the passages
    that were not in the cache. About 0.3 s per page on one core.
    """

    def __init__(
        self,
        page_ids: Sequence[str],
        texts: Sequence[str],
        leads: Sequence[str] | None = None,
        cache_dir: str | Path | None = None,
        name: str = "dense",
    ) -> None:
        leads = _checked_leads(page_ids, texts, leads)
        self.page_ids = tuple(page_ids)
        self.name = name
        self._encoder: SentenceEncoder = load_model(SentenceEncoder)
        self._passages: list[str] = []
        owners: list[int] = []
        for page, (text, lead) in enumerate(zip(texts, leads, strict=True)):
            passages = [f"{lead}\n{passage}" if lead else passage for passage in split_passages(text)]
            self._passages += passages
            owners += [page] * len(passages)
        self._owners = np.array(owners, dtype=np.int64)  # (passages,) index of the page
        folder = (Path(cache_dir) if cache_dir is not None else default_cache_dir()) / "text"
        documents = [page_id.rpartition("_")[0] for page_id in self.page_ids]
        blocks = _blocks([documents[page] for page in owners])
        self._vectors, self.encoded = encode_blocks(self._encoder, self._passages, blocks, folder)

    @classmethod
    def from_corpus(
        cls, corpus: Corpus, cache_dir: str | Path | None = None, lead: bool = True, name: str = "dense"
    ) -> DenseRetriever:
        """Over the text that the corpus' pages carry."""
        texts, leads = _page_texts(corpus)
        return cls(corpus.page_ids, texts, leads if lead else None, cache_dir, name)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query the best `k` pages."""
        return [rank_hits(self.page_ids, self._page_scores(query), k) for query in queries]

    def best_passages(self, query: str, page_ids: Sequence[str]) -> list[str]:
        """For each page its passage nearest to the query; empty for a page without text."""
        scores = self._passage_scores(query)
        best: dict[int, int] = {}
        for passage in np.argsort(scores, kind="stable"):  # ascending: the best of each page is written last
            best[int(self._owners[passage])] = int(passage)
        numbers = {page_id: number for number, page_id in enumerate(self.page_ids)}
        found = [best.get(numbers[page_id]) for page_id in page_ids]
        return [self._passages[passage] if passage is not None else "" for passage in found]

    def _page_scores(self, query: str) -> np.ndarray:
        pages = np.full(len(self.page_ids), np.inf)
        scores = self._passage_scores(query)
        if not len(scores):
            return np.zeros(len(self.page_ids))
        pages[:] = scores.min()
        np.maximum.at(pages, self._owners, scores)
        return pages

    def _passage_scores(self, query: str) -> np.ndarray:
        return self._vectors @ self._encoder.encode_query(query)  # (passages,)


class CrossEncoderScorer:
    """Relevance of pages to a query by ms-marco-MiniLM-L-12-v2, each read as its passage nearest to the query.

    About 0.1 s per page on one core.
    """

    def __init__(self, passages: DenseRetriever) -> None:
        self._passages = passages
        self._model: CrossEncoder = load_model(CrossEncoder)

    def __call__(self, query: str, page_ids: Sequence[str]) -> np.ndarray:
        return self._model.score(query, self._passages.best_passages(query, page_ids))


def default_text_retriever(corpus: Corpus, cache_dir: str | Path | None = None) -> Retriever:
    """The offline method that found most of our development questions: `fuse_text_retrievers` over the corpus' text."""
    return fuse_text_retrievers(BM25Retriever.from_corpus(corpus), DenseRetriever.from_corpus(corpus, cache_dir))


def fuse_text_retrievers(bm25: BM25Retriever, dense: DenseRetriever) -> Retriever:
    """BM25 and dense scores summed, the first ten pages read again by the cross-encoder."""
    fused = ScoreFusionRetriever((dense, bm25))
    return RerankRetriever(fused, CrossEncoderScorer(dense), depth=RERANK_DEPTH, name="text")


def encode_blocks(
    encoder: SentenceEncoder, passages: Sequence[str], blocks: Sequence[range], folder: Path
) -> tuple[np.ndarray, int]:
    """Vectors (passages, 384) float32 of all passages, and how many had to be computed; `blocks` partition them.

    A cached block that cannot be read, or is not of the right shape, is computed again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vectors = np.empty((len(passages), encoder.dimensions), dtype=np.float32)
    missing = []
    for block in blocks:
        cached = _read_block(_block_file(folder, encoder, passages, block), (len(block), encoder.dimensions))
        if cached is None:
            missing.append(block)
        else:
            vectors[block.start : block.stop] = cached
    total = sum(len(block) for block in missing)
    with tqdm(total=total, desc="encoding text", unit="passage", delay=1) as progress:
        for block in missing:
            for index in block:
                vectors[index] = encoder.encode(passages[index])
                progress.update()
            content = save({"vectors": vectors[block.start : block.stop]})
            write_atomically(_block_file(folder, encoder, passages, block), content)
    return vectors, total


def _block_file(folder: Path, encoder: SentenceEncoder, passages: Sequence[str], block: range) -> Path:
    digest = hashlib.sha256(f"{encoder.name} {encoder.fingerprint}\n".encode())
    for index in block:
        digest.update(passages[index].encode(errors="surrogatepass") + b"\0")
    return folder / f"{digest.hexdigest()}.safetensors"


def _read_block(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        vectors = load(file.read_bytes())["vectors"]
    except FileNotFoundError:
        return None
    except (OSError, KeyError, SafetensorError) as error:
        logger.warning("%s cannot be read (%s) and is made anew", file, error)
        return None
    return vectors if vectors.shape == shape and np.isfinite(vectors).all() else None


def _blocks(documents: Sequence[str]) -> list[range]:
    """Runs of equal neighbours in `documents`, none longer than _BLOCK_PASSAGES.

    >>> _blocks(["a", "a", "b"])
    [range(0, 2), range(2, 3)]
    """
    blocks = []
    start = 0
    for end in range(1, len(documents) + 1):
        if end == len(documents) or documents[end] != documents[start] or end - start == _BLOCK_PASSAGES:
            blocks.append(range(start, end))
            start = end
    return blocks


def _page_texts(corpus: Corpus) -> tuple[list[str], list[str]]:
    """Text and document lead of every page."""
    texts = [page.text for page in corpus.pages]
    return texts, document_leads([page.document_id for page in corpus.pages], texts)


def _checked_leads(page_ids: Sequence[str], texts: Sequence[str], leads: Sequence[str] | None) -> Sequence[str]:
    if len(page_ids) != len(texts) or (leads is not None and len(leads) != len(texts)):
        counts = f"{len(page_ids)} page ids, {len(texts)} texts" + (
            f", {len(leads)} leads" if leads is not None else ""
        )
        raise ValueError(f"pages, texts and leads must be equally many; got {counts}")
    return leads if leads is not None else [""] * len(texts)
