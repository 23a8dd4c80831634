"""A search server that answers as the authors' does, and the retriever that asks one.

    GET /search?queries=first+query&queries=second+query
    [[{"idx": 0, "image_file": ".../report_3.jpg"}, ...], [...]]

One list per query, best page first, `idx` the rank from 0, `image_file` a path that the client opens. The released
demo and trainer read page ids off the file's name, `{document}_{page}.jpg`, so every page gets a link of that name.

Deviations from the released server: requests that make no sense get a 4xx that says why; paths are absolute, so the
client may run anywhere on the machine (trap S10); `GET /image/{page id}` gives the bytes to clients on another one;
`GET /health` tells which retriever ranks and which corpus, so that a run does not go on with others. The client has
time-outs and bounded retries, where the released one waits for ever and dies of an error page (T22).
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

import httpx
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse

from vrag_lib import config
from vrag_lib.actions import MAX_QUERY_CHARS
from vrag_lib.rendering import IMAGE_SUFFIXES
from vrag_lib.retrieval import Hit, Retriever
from vrag_lib.settings import check_url

if TYPE_CHECKING:
    from vrag_lib.corpus import Corpus

logger = logging.getLogger(__name__)

MAX_QUERIES = 256
"""Queries of one request; the released client sends at most 100."""

MAX_CHARS = 8000
"""Characters of one query that the server accepts; retrievers cut queries shorter still."""

_MAX_REQUEST_BYTES = 16 * 2**20  # of the request line: 256 queries of 8000 characters, percent-encoded, mostly fit
_CHUNK_QUERIES, _CHUNK_BYTES = 100, 8000  # of one request of the client; servers commonly refuse lines above 16 KB
_MAX_NAME_BYTES = 255  # of a file name, on all usual file systems
_GATEWAY_ERRORS = (502, 503, 504)  # what a proxy answers while the server behind it is not up


class SearchServerError(RuntimeError):
    """A search server that cannot be reached or does not answer as one; the message names it."""


def create_app(
    retriever: Retriever,
    corpus: Corpus,
    top_k: int = 10,
    image_dir: str | Path | None = None,
    image_url: str | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    top_k: pages per query. image_dir: where links named `{page id}.jpg` are put; default: in the cache folder.
    image_url: base URL of this server as its clients see it; with it, `image_file` is a URL instead of a path.

    Raises ValueError when the retriever ranks pages that the corpus does not have.
    """
    missing = next((page_id for page_id in retriever.page_ids if page_id not in corpus), None)
    if missing is not None:
        raise ValueError(f"the retriever ranks page {missing!r}, which the corpus does not have; rebuild its index")
    if image_url:
        base = image_url.rstrip("/")
        files = {page_id: f"{base}/image/{quote(page_id, safe='')}" for page_id in retriever.page_ids}
    else:
        folder = Path(image_dir) if image_dir else config.cache_dir() / "served" / corpus.fingerprint[:24]
        files = {page_id: str(path) for page_id, path in link_images(corpus, folder).items()}
    served = {"retriever": retriever.name, "pages": len(retriever.page_ids), "corpus": corpus.fingerprint}
    turn = threading.Lock()  # requests arrive in threads; retrievers need not be thread-safe
    app = FastAPI(title="vrag search", docs_url=None, redoc_url=None)

    @app.get("/search")
    def search(request: Request) -> list[list[dict[str, Any]]]:
        queries = request.query_params.getlist("queries")
        problem = _problem(queries, set(request.query_params))
        if problem:
            raise HTTPException(400, problem)
        with turn:
            results = retriever.search(queries, top_k)
        return [[{"idx": i, "image_file": files[hit.page_id]} for i, hit in enumerate(hits)] for hits in results]

    @app.get("/image/{page_id:path}")
    def image(page_id: str) -> FileResponse:
        if page_id not in corpus:  # ids are looked up, never joined to a path
            raise HTTPException(404, "the corpus has no page of that id")
        path = corpus.page(page_id).image_path
        if not path.is_file():
            raise HTTPException(404, "the image of that page is gone; a restart of the server renders it anew")
        return FileResponse(path)

    @app.get("/health")
    async def health() -> dict[str, Any]:  # not in a thread: searches that wait for their turn may hold all of them
        return served

    return app


def _problem(queries: Sequence[str], names: set[str]) -> str | None:
    """What is wrong with a request, or None."""
    unknown = sorted(names - {"queries"})
    if unknown:
        return f"unknown parameter {unknown[0][:100]!r}; ask GET /search?queries=...&queries=..."
    if not queries:
        return "no queries; ask GET /search?queries=...&queries=..."
    if len(queries) > MAX_QUERIES:
        return f"{len(queries)} queries in one request, at most {MAX_QUERIES} are answered; ask in several requests"
    for number, query in enumerate(queries, 1):
        if len(query) > MAX_CHARS:
            return f"query {number} has {len(query)} characters, at most {MAX_CHARS} are answered"
    return None


def link_images(corpus: Corpus, folder: Path) -> dict[str, Path]:
    """A file named `served_name` for every page in `folder`, linked to the page image (copied where links cannot be
    made)."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for page in corpus.pages:
        target, image = folder / f"{served_name(page.id)}.jpg", page.image_path.resolve()
        if target.resolve() != image:
            target.unlink(missing_ok=True)
            try:
                target.symlink_to(image)
            except FileExistsError:  # another server for this corpus has just made it
                pass
            except OSError:
                shutil.copyfile(image, target)
        files[page.id] = target
    return files


def served_name(page_id: str) -> str:
    """What the served file of a page is called before its `.jpg`: the page id, or a digest of an id that is too long
    for a file name or holds what cannot stand in one.

    >>> served_name("annual report_12"), len(served_name("x" * 300 + "_1"))
    ('annual report_12', 64)
    """
    usable = len(page_id.encode(errors="replace")) + len(".jpg") <= _MAX_NAME_BYTES and not set(page_id) & set("/\\\0")
    return page_id if usable else hashlib.sha256(page_id.encode(errors="replace")).hexdigest()


def serve(retriever: Retriever, corpus: Corpus, host: str = "127.0.0.1", port: int = 8002, top_k: int = 10) -> None:
    """Answer requests until interrupted. The default address is reachable from this machine only."""
    make_server(retriever, corpus, host, port, top_k).run()


def make_server(retriever: Retriever, corpus: Corpus, host: str, port: int, top_k: int = 10) -> Any:
    """The uvicorn server that `serve` runs; a whole batch of long queries fits its request line."""
    import uvicorn

    app = create_app(retriever, corpus, top_k)
    return uvicorn.Server(
        uvicorn.Config(app, host=host, port=port, http="h11", h11_max_incomplete_event_size=_MAX_REQUEST_BYTES)
    )


class RemoteRetriever:
    """A `Retriever` that asks a search server: this module's or the authors' own.

    The server gives ranks without scores; the score of a hit is 1 / (1 + rank), a page that it gives twice counts once.
    It is asked for its /health once, by the first search or use of `name`.

    url: base URL or the URL of /search. corpus: what the server has indexed. timeout: seconds per attempt.
    attempts: per request; `pause` seconds before the second, twice as long before each further one. A refusal (4xx
    but 408 and 429) is not tried again. Queries are cut at `actions.MAX_QUERY_CHARS` characters.

    Raises ConfigError for an address that is none, or that holds a user name, password or query: records keep it.
    """

    def __init__(
        self,
        url: str,
        corpus: Corpus,
        timeout: float = 60.0,
        attempts: int = 4,
        pause: float = 0.5,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        check_url("the URL of the search server", url)
        self.url = url.rstrip("/").removesuffix("/search") + "/search"
        self.page_ids = tuple(corpus.page_ids)
        self.attempts, self.pause, self._sleep = max(1, attempts), pause, sleep
        self._corpus = corpus
        self._ids = {name: page_id for page_id in self.page_ids for name in (served_name(page_id), page_id)}
        self._name = ""
        self._client = httpx.Client(timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)), transport=transport)

    @property
    def name(self) -> str:
        """`remote:` and the name of the server's retriever, wherever it runs; the URL of a server that tells none, such
        as the authors' own. Raises SearchServerError when it cannot be reached or serves another corpus."""
        self._meet()
        return self._name

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The pages the server ranks for each query, at most `k`, in requests of up to 100 queries.

        Raises SearchServerError when the server cannot be reached, refuses, or serves or answers with another corpus.
        """
        found: list[list[Hit]] = []
        for chunk in _chunks(queries):
            self._meet()
            response = self._get(self.url, chunk)
            if response.status_code != 200:
                raise _refusal(self.url, response)
            try:
                answer = response.json()
            except (ValueError, RecursionError):
                raise SearchServerError(f"{self.url} answered with something other than JSON") from None
            if not isinstance(answer, list) or len(answer) != len(chunk):
                raise SearchServerError(f"{self.url} did not answer with one list for each of {len(chunk)} queries")
            found += [self._hits(results, k) for results in answer]
        return found

    def _hits(self, results: Any, k: int) -> list[Hit]:
        try:
            if all(isinstance(result.get("idx"), int) for result in results):
                results = sorted(results, key=lambda result: result["idx"])
            names = [page_id_of(result["image_file"]) for result in results]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SearchServerError(f"{self.url} gave a result that is not {{idx, image_file}}: {error!r}") from error
        distinct = list(dict.fromkeys(self._ids.get(name, name) for name in names))[: max(0, k)]
        unknown = next((page_id for page_id in distinct if page_id not in self._ids), None)
        if unknown is not None:
            raise SearchServerError(
                f"{self.url} found page {unknown!r}, which this corpus does not have; does it serve another?"
            )
        return [Hit(page_id, 1 / (1 + rank)) for rank, page_id in enumerate(distinct)]

    def _meet(self) -> None:
        """Learn, once, what the server calls its retriever, and that it serves this corpus."""
        if self._name:
            return
        url = self.url.removesuffix("/search") + "/health"
        response = self._get(url)
        if response.status_code in _GATEWAY_ERRORS:
            raise _refusal(url, response)
        told: Any = None
        if response.status_code == 200:
            with suppress(ValueError, RecursionError):
                told = response.json()
        if not isinstance(told, dict) or not isinstance(told.get("retriever"), str):
            self._name = f"remote:{self.url}"
            return
        pages = f"{told.get('pages')} pages there, {len(self.page_ids)} here"
        if "corpus" not in told and told.get("pages") != len(self.page_ids):
            logger.warning("%s may serve another corpus: %s", self.url, pages)
        if told.get("corpus", self._corpus.fingerprint) != self._corpus.fingerprint:
            raise SearchServerError(
                f"{self.url} serves another corpus ({pages}); let it serve the same documents, rendered at the same "
                "corpus.dpi, or give the address of a server that does"
            )
        self._name = f"remote:{told['retriever']}"

    def _get(self, url: str, queries: Sequence[str] = ()) -> httpx.Response:
        """The answer, after as many attempts as it takes or are allowed: with status 408, 429 or 5xx only the last.

        Raises SearchServerError when the last attempt got none.
        """
        for attempt in range(1, self.attempts + 1):
            if attempt > 1:
                self._sleep(self.pause * 2 ** (attempt - 2))
            try:
                response = self._client.get(url, params=[("queries", query) for query in queries])
            except httpx.TransportError as error:
                if attempt == self.attempts:
                    raise SearchServerError(
                        f"{url} gave no answer in {attempt} attempts; the last failed with "
                        f"{type(error).__name__}: {error}"
                    ) from error
                continue
            if response.status_code < 500 and response.status_code not in (408, 429):
                break
        return response


def _refusal(url: str, response: httpx.Response) -> SearchServerError:
    return SearchServerError(f"{url} refused the request: status {response.status_code}: {response.text[:300]}")


def page_id_of(image_file: str) -> str:
    """The page id in an `image_file`, a path or URL: its last part without the suffix of an image.

    >>> page_id_of("./search_engine/corpus/img/2023.acl-long_4.jpg"), page_id_of("D:\\\\img\\\\deck_5.PNG")
    ('2023.acl-long_4', 'deck_5')
    >>> page_id_of("http://localhost:8002/image/annual%20report_12")
    'annual report_12'
    """
    if "://" in image_file:
        name = unquote(urlsplit(image_file).path.rsplit("/", 1)[-1])
    else:
        name = image_file.replace("\\", "/").rsplit("/", 1)[-1]
    return name[: name.rindex(".")] if name.lower().endswith(IMAGE_SUFFIXES) else name


def _chunks(queries: Sequence[str]) -> Iterator[list[str]]:
    """Runs of queries that fit one request; a query of its own if it alone is too long."""
    chunk: list[str] = []
    size = 0
    for query in queries:
        query = query[:MAX_QUERY_CHARS].encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent
        cost = len(quote(query)) + len("&queries=")
        if chunk and (len(chunk) == _CHUNK_QUERIES or size + cost > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(query)
        size += cost
    if chunk:
        yield chunk
