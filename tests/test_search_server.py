"""search_server: the authors' wire format, clear refusals, no file but the corpus's own, a client that gives up."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from vrag_lib.config import ConfigError
from vrag_lib.corpus import Corpus, Document, Page
from vrag_lib.geometry import Size
from vrag_lib.retrieval import Hit, Retriever
from vrag_lib.search_server import (
    MAX_CHARS,
    MAX_QUERIES,
    RemoteRetriever,
    SearchServerError,
    create_app,
    link_images,
    make_server,
    serve,
)


class FixedRetriever:
    """Ranks all pages from one that the query's length picks; remembers what it was asked."""

    name = "fixed"

    def __init__(self, page_ids: Sequence[str]):
        self.page_ids = tuple(page_ids)
        self.asked: list[list[str]] = []

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.asked.append(list(queries))
        rankings = []
        for query in queries:
            start = len(query) % len(self.page_ids)
            order = self.page_ids[start:] + self.page_ids[:start]
            rankings.append([Hit(page_id, -float(i)) for i, page_id in enumerate(order[:k])])
        return rankings


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Fifteen pages whose image files are named otherwise than the pages; an image beside them is no page."""
    pages = []
    for number in range(1, 16):
        path = tmp_path / "cache" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (28, 28), (number, 0, 0)).save(path)
        pages.append(Page(f"annual report 2.0_{number}", "annual report 2.0", number, path, Size(28, 28)))
    Image.new("RGB", (28, 28)).save(tmp_path / "cache" / "secret.png")
    (tmp_path / "secret.txt").write_text("secret")
    return Corpus([Document("annual report 2.0", tmp_path / "annual report 2.0.pdf", "0" * 64, tuple(pages))])


@pytest.fixture
def retriever(corpus) -> FixedRetriever:
    return FixedRetriever(corpus.page_ids)


@pytest.fixture
def client(corpus, retriever, tmp_path) -> TestClient:
    return TestClient(create_app(retriever, corpus, image_dir=tmp_path / "served"))


def test_the_answer_is_what_the_released_demo_and_trainer_read(client, corpus):
    answer = client.get("/search", params={"queries": ["ab", "three words & more?"]}).json()
    assert [len(results) for results in answer] == [10, 10]
    for results in answer:
        assert [result["idx"] for result in results] == list(range(10))
        assert all(set(result) == {"idx", "image_file"} for result in results)
    paths = [result["image_file"] for result in answer[0]]  # as in the demo's search()
    assert all(os.path.isabs(path) for path in paths)
    assert [Image.open(path).convert("RGB").getpixel((0, 0))[0] for path in paths] == list(range(3, 13))
    names = [os.path.basename(path.rstrip("/")).split(".jpg")[0] for path in paths]  # as in the trainer's reward
    assert names == list(corpus.page_ids[2:12])


def test_top_k_and_urls_are_settings(corpus, retriever, tmp_path):
    app = create_app(retriever, corpus, top_k=2, image_url="http://example.org:8002/")
    answer = TestClient(app).get("/search?queries=").json()
    assert [result["image_file"] for result in answer[0]] == [
        "http://example.org:8002/image/annual%20report%202.0_1",
        "http://example.org:8002/image/annual%20report%202.0_2",
    ]
    assert TestClient(app).get(answer[0][1]["image_file"].removeprefix("http://example.org:8002")).status_code == 200
    with pytest.raises(ValueError, match="ranks page 'x_1', which the corpus does not have"):
        create_app(FixedRetriever(["x_1"]), corpus, image_dir=tmp_path)


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/search", 400, "no queries; ask GET /search"),
        ("GET", "/search?query=a", 400, "unknown parameter 'query'"),
        ("GET", "/search?queries=a&k=3", 400, "unknown parameter 'k'"),
        ("GET", "/search?" + "&".join(["queries=a"] * (MAX_QUERIES + 1)), 400, "at most 256 are answered"),
        ("GET", "/search?queries=a&queries=" + "x" * (MAX_CHARS + 1), 400, "query 2 has 8001 characters"),
        ("POST", "/search", 405, "Method Not Allowed"),
        ("GET", "/nothing", 404, "Not Found"),
        ("GET", "/image/annual report 2.0_99", 404, "no page of that id"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(client, retriever, method, path, status, message):
    response = client.request(method, path)
    assert response.status_code == status and message in response.json()["detail"]
    assert not retriever.asked


def test_pages_of_the_corpus_and_nothing_else_can_be_fetched(client, corpus, tmp_path):
    for page in corpus.pages:
        assert client.get(f"/image/{page.id}").content == page.image_path.read_bytes()
    for path in (
        "secret.png",
        "../secret.txt",
        "..%2f..%2fsecret.txt",
        "%2e%2e/%2e%2e/secret.txt",
        "%2e%2e%2fsecret.png",
        "..\\secret.txt",
        str(tmp_path / "secret.txt"),
        "%2F" + str(tmp_path / "secret.txt").strip("/").replace("/", "%2F"),
        "annual report 2.0_1%00",
        "annual report 2.0_1/../../secret.txt",
        "annual report 2.0_1.png",
        "file://" + str(tmp_path / "secret.txt"),
        "",
    ):
        response = client.get(f"/image/{path}")
        assert response.status_code == 404 and "secret" not in response.text.replace("secret.", ""), path


@pytest.mark.parametrize("image_url", [None, "http://host"])
def test_pages_whose_ids_are_no_file_names_are_served_and_found(corpus, tmp_path, image_url):
    ids = ["../../up_1", "a/b_1", "nul\0_1", "a\\b_1", "x" * 300 + "_1", "ü" * 125 + "_1", "..", "fine_1"]
    pages = [Page(page_id, "d", i, corpus.pages[i].image_path, Size(28, 28)) for i, page_id in enumerate(ids)]
    odd = Corpus([Document("d", tmp_path / "d.pdf", "1" * 64, tuple(pages))])
    files = link_images(odd, tmp_path / "links")
    assert len(list((tmp_path / "links").iterdir())) == len(ids)
    assert {"...jpg", "fine_1.jpg"} == {path.name for path in files.values() if len(path.name) < 60}
    for page in pages:
        assert files[page.id].read_bytes() == page.image_path.read_bytes()
    app = create_app(FixedRetriever(ids), odd, image_dir=tmp_path / "links", image_url=image_url)
    found = [hit.page_id for hit in client_of(app, odd).search(["x" * len(ids)], 10)[0]]
    assert found == ids


def client_of(app, corpus) -> RemoteRetriever:
    """A client of an application, without a network between them."""
    served = TestClient(app)
    return RemoteRetriever(
        "http://server:1", corpus, transport=httpx.MockTransport(lambda request: relayed(served, request))
    )


def relayed(served: TestClient, request: httpx.Request) -> httpx.Response:
    answer = served.get(request.url.raw_path.decode())
    return httpx.Response(answer.status_code, content=answer.content)


def test_an_image_that_is_gone_is_not_found(client, corpus):
    corpus.pages[0].image_path.unlink()
    response = client.get(f"/image/{corpus.page_ids[0]}")
    assert response.status_code == 404 and "restart of the server" in response.json()["detail"]


def test_links_follow_the_corpus_and_are_copies_where_links_cannot_be_made(corpus, tmp_path, monkeypatch):
    files = link_images(corpus, tmp_path / "links")
    first = files[corpus.page_ids[0]]
    first.unlink()
    first.symlink_to(tmp_path / "secret.txt")
    assert link_images(corpus, tmp_path / "links")[corpus.page_ids[0]].resolve() == corpus.pages[0].image_path

    def refused(self, target):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refused)
    copies = link_images(corpus, tmp_path / "copies")
    assert all(copies[page.id].read_bytes() == page.image_path.read_bytes() for page in corpus.pages)
    assert not any(path.is_symlink() for path in copies.values())


@pytest.fixture
def running(corpus, retriever, tmp_path, monkeypatch):
    """A real server on a free port: its address."""
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "vrag-cache"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = make_server(retriever, corpus, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield "127.0.0.1", port
    server.should_exit = True
    thread.join(20)


def test_a_real_server_takes_the_trainers_batches_and_no_raw_traversal(running, corpus, retriever):
    host, port = running
    batch = [f"{i} " + "总收入是多少" * 50 for i in range(100)]  # 2.7 KB each once percent-encoded
    with urlopen(f"http://{host}:{port}/search?{urlencode({'queries': batch}, doseq=True)}") as response:
        answer = json.load(response)
    assert len(answer) == 100 and retriever.asked == [batch]
    for target in ("/image/../../../../etc/passwd", "/../../etc/passwd", "//etc/passwd", "/image//etc/passwd"):
        with socket.create_connection((host, port)) as raw:  # clients tidy such paths up before sending
            raw.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            reply = b"".join(iter(lambda: raw.recv(65536), b""))
        assert reply.startswith(b"HTTP/1.1 404") and b"root:" not in reply
    health = httpx.get(f"http://{host}:{port}/health").json()
    assert health == {"retriever": "fixed", "pages": 15, "corpus": corpus.fingerprint}
    remote = RemoteRetriever(f"http://{host}:{port}", corpus)
    assert isinstance(remote, Retriever)
    queries = ["ab", "总收入" * 400, *["x" * n for n in range(250)], "\ud800"]
    want = retriever.search([query.encode("utf-8", "replace").decode() for query in queries], 7)
    got = remote.search(queries, 7)
    assert [[hit.page_id for hit in hits] for hits in got] == [[hit.page_id for hit in hits] for hits in want]
    assert [hit.score for hit in got[0]] == [1 / rank for rank in range(1, 8)]
    assert max(len(asked) for asked in retriever.asked[2:]) <= 100


def test_health_answers_while_searches_wait(running, retriever, monkeypatch):
    host, port = running
    began, go_on = threading.Semaphore(0), threading.Event()

    def search(queries, k):
        began.release()
        go_on.wait(20)
        return [[] for _ in queries]

    monkeypatch.setattr(retriever, "search", search)
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(httpx.get, f"http://{host}:{port}/search?queries=q", timeout=30) for _ in range(60)]
        try:
            assert began.acquire(timeout=20)
            time.sleep(0.5)  # until all threads of the server are taken
            assert httpx.get(f"http://{host}:{port}/health", timeout=5).status_code == 200
        finally:
            go_on.set()
    assert all(answer.result().status_code == 200 for answer in waiting)


def test_serve_runs_that_server(monkeypatch, corpus, retriever):
    calls = []

    class Server:
        def run(self):
            calls.append("run")

    monkeypatch.setattr("vrag_lib.search_server.make_server", lambda *arguments: calls.append(arguments) or Server())
    serve(retriever, corpus)
    assert calls == [(retriever, corpus, "127.0.0.1", 8002, 10), "run"]


def remote(corpus, answers, health=None, **options) -> tuple[RemoteRetriever, list]:
    """A client whose searches get the given answers, one after the other; what it did is in the list. The server has no
    /health, as the authors', unless its answer is given."""
    log: list = []
    answers = iter(answers)

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return health or httpx.Response(404, json={"detail": "Not Found"})
        log.append(request.url.params.get_list("queries"))
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    retriever = RemoteRetriever(
        "http://server:1/search", corpus, transport=httpx.MockTransport(handler), sleep=log.append, **options
    )
    return retriever, log


def answer_of(*names: str) -> httpx.Response:
    return httpx.Response(200, json=[[{"idx": i, "image_file": name} for i, name in enumerate(names)]])


def test_the_client_tries_again_with_growing_pauses(corpus):
    good = answer_of("./search_engine/corpus/img/annual report 2.0_4.jpg", "D:\\img\\annual report 2.0_5.jpg")
    failures = [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.Response(503, text="busy")]
    retriever, log = remote(corpus, [*failures, good])
    hits = retriever.search(["q"], 10)[0]
    assert [hit.page_id for hit in hits] == ["annual report 2.0_4", "annual report 2.0_5"]
    assert log == [["q"], 0.5, ["q"], 1.0, ["q"], 2.0, ["q"]]
    retriever, log = remote(corpus, [httpx.ConnectError("refused")] * 2, attempts=2)
    with pytest.raises(SearchServerError, match="no answer in 2 attempts; the last failed with ConnectError: refused"):
        retriever.search(["q"], 10)
    assert len(log) == 3


def test_a_server_that_hangs_is_not_waited_for(corpus):
    """It takes connections and never answers; it ends after a while, so that a client without a time-out fails here."""
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        end = threading.Timer(10, hanging.close)
        end.start()
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        with pytest.raises(SearchServerError, match="no answer in 2 attempts; the last failed with ReadTimeout"):
            RemoteRetriever(url, corpus, timeout=0.2, attempts=2, pause=0.01).search(["q"], 10)
        end.cancel()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.Response(400, json={"detail": "no queries"}), "refused the request: status 400.*no queries"),
        (httpx.Response(200, text="<html>error</html>"), "something other than JSON"),
        (httpx.Response(200, text="[" * 100_000), "something other than JSON"),
        (httpx.Response(200, json={"results": []}), "one list for each of 1 queries"),
        (httpx.Response(200, json=[[], []]), "one list for each of 1 queries"),
        (httpx.Response(200, json=[[{"idx": 0}]]), "not {idx, image_file}"),
        (httpx.Response(200, json=[3]), "not {idx, image_file}"),
        (httpx.Response(200, json=[[{"image_file": None}]]), "not {idx, image_file}"),
        (answer_of("other_1.jpg"), "found page 'other_1', which this corpus does not have"),
    ],
)
def test_an_answer_that_makes_no_sense_is_named_and_not_asked_for_again(corpus, answer, message):
    retriever, log = remote(corpus, [answer])
    with pytest.raises(SearchServerError, match=message):
        retriever.search(["q"], 10)
    assert len(log) == 1


def test_the_name_is_that_of_the_retriever_wherever_it_runs(corpus, retriever, tmp_path):
    app = create_app(retriever, corpus, image_dir=tmp_path / "served")
    assert client_of(app, corpus).name == "remote:fixed"
    elsewhere, _ = remote(corpus, [], health=httpx.Response(200, json={"retriever": "fixed", "pages": 15}))
    assert elsewhere.name == "remote:fixed"


@pytest.mark.parametrize(
    "health",
    [
        None,
        httpx.Response(500, text="no such path"),
        httpx.Response(200, text="ok"),
        httpx.Response(200, json=["ok"]),
        httpx.Response(200, json={"status": "ok"}),
    ],
)
def test_a_server_that_does_not_tell_its_retriever_is_called_by_its_url(corpus, health):
    retriever, _ = remote(corpus, [answer_of("annual report 2.0_4.jpg")], health=health)
    assert retriever.name == "remote:http://server:1/search"
    assert retriever.search(["q"], 1)[0][0].page_id == "annual report 2.0_4"


def test_a_server_that_is_not_up_has_no_name(corpus):
    dead, _ = remote(corpus, [], health=httpx.Response(502, text="starting"))
    with pytest.raises(SearchServerError, match="health refused the request: status 502: starting"):
        dead.name  # noqa: B018


def test_a_server_of_another_corpus_is_refused_and_one_of_other_pages_named(corpus, retriever, tmp_path, caplog):
    fewer = Corpus([replace(corpus.documents[0], sha256="2" * 64, pages=corpus.pages[:14])])
    other = client_of(create_app(FixedRetriever(fewer.page_ids), fewer, image_dir=tmp_path / "served"), corpus)
    for ask in (lambda: other.name, lambda: other.search(["q"], 1)):
        with pytest.raises(SearchServerError, match=r"serves another corpus \(14 pages there, 15 here\)"):
            ask()
    assert not caplog.text
    older, _ = remote(corpus, [], health=httpx.Response(200, json={"retriever": "fixed", "pages": 14}))
    assert older.name == "remote:fixed"
    assert "may serve another corpus: 14 pages there, 15 here" in caplog.text


@pytest.mark.parametrize(
    "image_file",
    [
        "http://host/img/annual%20report%202.0_7.jpg",
        "HTTPS://host/img/annual%20report%202.0_7",
        "/img/annual report 2.0_7.JPG",
        "annual report 2.0_7.jpeg",
        "img/annual report 2.0_7.png",
        "D:\\img\\annual report 2.0_7.Webp",
    ],
)
def test_images_are_known_by_path_and_url_whatever_their_suffix(corpus, image_file):
    retriever, _ = remote(corpus, [answer_of(image_file)])
    assert retriever.search(["q"], 1)[0][0].page_id == "annual report 2.0_7"


def test_ranks_are_followed_and_a_page_counts_once(corpus):
    ranked = [(2, 5), (0, 4), (1, 4), (3, 6)]
    results = [{"idx": idx, "image_file": f"annual report 2.0_{number}.jpg"} for idx, number in ranked]
    retriever, _ = remote(corpus, [httpx.Response(200, json=[results])])
    hits = retriever.search(["q"], 2)[0]
    assert [(hit.page_id[-1], hit.score) for hit in hits] == [("4", 1), ("5", 1 / 2)]
    del results[3]["idx"]
    retriever, _ = remote(corpus, [httpx.Response(200, json=[results])])
    assert [hit.page_id[-1] for hit in retriever.search(["q"], 10)[0]] == ["5", "4", "6"]


@pytest.mark.parametrize("url", ["http://user:secret@host", "http://host/search?key=secret", "secret:8000"])
def test_an_address_that_holds_a_secret_or_is_none_is_refused(corpus, url):
    with pytest.raises(ConfigError, match="the URL of the search server") as error:
        RemoteRetriever(url, corpus)
    assert "secret" not in str(error.value)


def test_an_empty_search_is_no_request(corpus):
    retriever, log = remote(corpus, [])
    assert retriever.search([], 10) == [] and not log
    retriever, _ = remote(corpus, [httpx.Response(200, json=[[]])])
    assert retriever.search(["q"], 10) == [[]]  # a server whose corpus is empty
