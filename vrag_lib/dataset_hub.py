"""The public benchmarks by name: fetched from the Hugging Face hub and kept in the unified format below the cache.

    load_dataset("unified", fetch_dataset("vidoseek"))

What is fetched (sizes and licences: README):

* `vidoseek`, and `slidevqa` as the paper evaluates it: refined test questions (2,020) that ViDoSeek's repository holds
  beside its own, each with an archive of PDFs. Nobody has to register for them; the original SlideVQA, with its
  training part, is another repository (NTT-hil-insight/SlideVQA), behind an agreement, and is read from a local copy.
* `mmlongbench_doc`: the PDFs that its questions name, from the hub. The questions come from the benchmark's GitHub
  repository, whose 1,082 hold the paper's 847; the hub has a later edition of 1,091. One PDF comes from GitHub as well,
  because the hub hands out another file under its name.

Revisions are pinned, data files are all that is read, and no code of a data set is run. Where a token is needed, the
hub's own client finds it (`hf auth login` or `HF_TOKEN`); nothing here reads or keeps one.
"""

from __future__ import annotations

import glob
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from vrag_lib.config import cache_dir
from vrag_lib.corpus_formats import load_questions, write_unified
from vrag_lib.document_files import CorpusError
from vrag_lib.rendering import PDF_SUFFIXES, write_atomically

_GITHUB = "https://raw.githubusercontent.com/mayubo2333/MMLongBench-Doc/d73f0dc0be7e0a2ff6a403d5fe65fcd96461f384/data"


@dataclass(frozen=True)
class HubDataset:
    """Where a benchmark lies: hub repository and pinned commit; its question file; its documents, an archive or a
    folder; `urls`, files that are taken from elsewhere, by their names here; `by_hand`, how to fetch it without us."""

    repo: str
    revision: str
    questions: str
    documents: str
    by_hand: str
    urls: Mapping[str, str] = field(default_factory=dict)

    @property
    def page(self) -> str:
        """Address of the data set's page, where terms are accepted."""
        return f"https://huggingface.co/datasets/{self.repo}"


def _vidoseek(questions: str, archive: str) -> HubDataset:
    repo, revision = "Qiuchen-Wang/ViDoSeek", "e91a92ba5f38690696c7e66be5c5474b54c6e791"
    by_hand = (
        f"`hf download {repo} {questions} {archive} --repo-type dataset --revision {revision} --local-dir DIR`, "
        f"`unzip DIR/{archive} -d DIR/documents`"
    )
    return HubDataset(repo, revision, questions, archive, by_hand)


HUB_DATASETS = {
    "slidevqa": _vidoseek("slidevqa_refined.json", "slidevqa_pdf_document.zip"),
    "vidoseek": _vidoseek("vidoseek.json", "vidoseek_pdf_document.zip"),
    "mmlongbench_doc": HubDataset(
        "yubo2333/MMLongBench-Doc",
        "2ff6aa9237fc777b6627dc57a486e9225ac5fb86",
        "samples.json",
        "documents",
        "`git clone https://github.com/mayubo2333/MMLongBench-Doc`, whose folder `data` is DIR",
        {
            "samples.json": f"{_GITHUB}/samples.json",
            "documents/mi_phone.pdf": f"{_GITHUB}/documents/mi_phone.pdf",
        },
    ),
}
"""The benchmarks that need no local copy."""

DONE = "questions.json"
"""Written last, so a folder that holds it is whole; without it the folder is gone on with."""


def find_dataset(dataset: str | Path) -> Path:
    """The folder itself, or for the name of a benchmark the one that `fetch_dataset` gives. CorpusError as there."""
    if Path(dataset).exists() or str(dataset) not in HUB_DATASETS:
        return Path(dataset)
    return fetch_dataset(str(dataset))


def fetch_dataset(name: str, folder: str | Path | None = None) -> Path:
    """The folder with `questions.json` (unified format) and `documents/` (PDFs) of a benchmark, made on the first call.

    folder: default `<cache>/datasets/<name>-<start of the revision>`. The download goes to the hub client's own cache.
    What was interrupted is gone on with: neither a finished download nor an unpacked document is made again.

    Raises CorpusError, saying what to do, for an unknown name, a hub that cannot be reached, a data set whose terms
    were not accepted, a broken archive, and files that are not where they should be.
    """
    if name not in HUB_DATASETS:
        raise CorpusError(f"there is no data set {name!r} to fetch; there are {', '.join(HUB_DATASETS)}")
    source = HUB_DATASETS[name]
    folder = Path(folder) if folder else cache_dir() / "datasets" / f"{name}-{source.revision[:8]}"
    if (folder / DONE).is_file():
        return folder
    documents = folder / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    with _remedy(name, source):
        for file, url in source.urls.items():
            _fetch_file(url, folder / file)
        if source.questions in source.urls:
            questions = load_questions(folder / source.questions, name)
            patterns = _document_patterns(source, {question.file_name for question in questions})
            snapshot = _fetch_snapshot(source, patterns)
        else:
            snapshot = _fetch_snapshot(source, [source.questions, source.documents])
            questions = load_questions(_expected(snapshot / source.questions, source), name)
        for document, size, read in tqdm(list(_documents(snapshot, source)), desc=f"unpacking {name}", delay=1):
            target = documents / document
            if not target.is_file() or target.stat().st_size != size:
                write_atomically(target, read())
    write_unified(questions, folder / DONE)
    return folder


@contextmanager
def _remedy(name: str, source: HubDataset) -> Iterator[None]:
    """Turns what may go wrong on the way into a CorpusError that names it and says what to do."""
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except GatedRepoError as error:
        raise CorpusError(
            f"data set {name!r} is given out only to those who accept its terms: do so at {source.page}, then "
            "`hf auth login`, and run the same command again"
        ) from error
    except Exception as error:  # the hub client's errors share no base class with those of the network below it
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise CorpusError(
            f"data set {name!r} could not be fetched from {source.page}: {reason}. The same "
            "command goes on where this stopped. Or fetch it where the hub can be reached, and pass the folder DIR "
            f"with --path: {source.by_hand}"
        ) from error


def _fetch_file(url: str, target: Path) -> None:
    """A small file from elsewhere than the hub. Raises CorpusError for an answer that is no such file, as networks give
    that want a log-in first: such an answer is not kept."""
    import httpx

    if target.is_file() and _is_as_named(target.name, target.read_bytes()):
        return
    response = httpx.get(url, follow_redirects=True, timeout=60)
    response.raise_for_status()
    if not _is_as_named(target.name, response.content):
        raise CorpusError(
            f"what {url} gave for {target.name} is no such file and was not kept, it begins {response.content[:40]!r}; "
            "see in a browser whether this network wants a log-in first"
        )
    write_atomically(target, response.content)


def _is_as_named(name: str, content: bytes) -> bool:
    """Whether this is a PDF, or for a name in .json a list in JSON, as benchmarks keep questions."""
    if not name.endswith(".json"):
        return b"%PDF" in content[:1024]  # where readers look for it
    try:
        return isinstance(json.loads(content), list)
    except ValueError:
        return False


def _fetch_snapshot(source: HubDataset, patterns: list[str]) -> Path:
    """The folder in the hub client's cache that holds the files of those patterns; it shows its own progress."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source.repo, repo_type="dataset", revision=source.revision, allow_patterns=patterns))


def _document_patterns(source: HubDataset, names: set[str]) -> list[str]:
    """The documents that questions name, which is not all that the folder holds, less those taken from elsewhere."""
    files = [f"{source.documents}/{name}" for name in sorted(names)]
    return [glob.escape(file) for file in files if file not in source.urls]


def _documents(snapshot: Path, source: HubDataset) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Name, bytes and reader of every PDF that was fetched."""
    path = _expected(snapshot / source.documents, source)
    if path.is_dir():
        found = [(file.name, file.stat().st_size, file.read_bytes) for file in sorted(path.iterdir())]
    else:
        found = list(_archived(path))
    found = [item for item in found if item[0].lower().endswith(PDF_SUFFIXES) and not item[0].startswith(".")]
    if not found:
        raise CorpusError(f"{source.documents} of {source.repo} holds no PDF")
    yield from found


def _archived(path: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """The files of a zip archive by their last names: what folders they claim to be in leads nowhere."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error

    def read(member: zipfile.ZipInfo) -> bytes:
        try:
            return archive.read(member)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise _damaged(path, error) from error

    for member in archive.infolist():
        if not member.is_dir():
            yield PurePosixPath(member.filename).name, member.file_size, partial(read, member)


def _damaged(path: Path, error: Exception) -> CorpusError:
    # the hub's cache holds links: without the file behind one it is fetched anew, without the link it is not
    return CorpusError(f"{path.name} is damaged ({error}); delete {path.resolve()}, so that it is fetched anew")


def _expected(path: Path, source: HubDataset) -> Path:
    if not path.exists():
        raise CorpusError(f"{source.repo} at {source.revision[:8]} gave no {path.name}, which is expected there")
    return path
