"""ColPali-family models that turn pages and queries into token embeddings, in two ways that agree.

`ByaldiEncoder` indexes pages through byaldi's RAGMultiModalModel; `ColPaliEncoder` runs colpali-engine's model and
processor itself, in batches. Both give what the model gives one page at a time: batches hold pages of one size only,
so nothing is padded, and queries are encoded one by one. (Left padding is a trap: where the padding token's embedding
is zero, as in some checkpoints, its projection has length zero and the division by it gives NaN.)

A checkpoint is a folder or a hub id, a full model or a LoRA adapter. Its class follows from its config, never from
its name. After loading, every tensor of the checkpoint must be found among the model's parameters and every parameter
in the checkpoint, value by value: some versions of transformers drop an adapter whose key names they do not expect
and say so in a log line only, and rankings come out reversed (colpali-engine issue 424).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vrag_lib.actions import MAX_QUERY_CHARS
from vrag_lib.torch_setup import ensure_torchvision

if TYPE_CHECKING:
    import torch

    from vrag_lib.corpus import Page

MODEL_CLASSES = {"paligemma": "ColPali", "qwen2_vl": "ColQwen2", "qwen2_5_vl": "ColQwen2_5"}
"""`model_type` of a checkpoint's config -> class of colpali-engine; the processor is `{class}Processor`, for
ColQwen2_5 `ColQwen2_5_Processor`."""

_BYALDI_FORMATS = (".png", ".jpg", ".jpeg", ".bmp")
_BYALDI_PAGES = 32  # pages per byaldi index; byaldi writes its whole index to disk after every call


class ModelError(RuntimeError):
    """A checkpoint that cannot be used; the message names it and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder, the folder of the base model if it is an adapter, colpali-engine's class."""

    name: str
    folder: Path
    base: Path | None
    model_class: str

    @property
    def weight_files(self) -> list[Path]:
        folders = [self.folder] if self.base is None else [self.base, self.folder]
        return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]

    def fingerprint(self) -> str:
        """sha256 (hex) over weights, configs and tokenizer files, the base model's included."""
        digest = hashlib.sha256(self.model_class.encode())
        for folder in (self.folder, self.base):
            for path in sorted(folder.iterdir()) if folder else []:
                if path.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model"):
                    with open(path, "rb") as file:
                        digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


class PageEncoder(Protocol):
    """What an index is built with. Embeddings are float32 arrays (tokens, dim) of values that bf16 or fp32 hold."""

    engine: str
    name: str
    fingerprint: str
    versions: dict[str, str]
    dtype: str

    def encode_pages(self, pages: Sequence[Page]) -> Iterator[tuple[Page, np.ndarray]]:
        """The embeddings of each page, in whatever order is fastest."""
        ...

    def encode_query(self, text: str) -> np.ndarray:
        """The embeddings of one query."""
        ...


def load_encoder(
    model: str | Path, engine: str = "byaldi", device: str = "auto", dtype: str = "bfloat16", batch_size: int = 8
) -> PageEncoder:
    """An encoder for a checkpoint folder or hub id; engine "byaldi" or "native", device "auto", "cpu" or "cuda",
    dtype "bfloat16" or, with the native engine only, "float32".

    Raises ModelError for a checkpoint that cannot be used, ValueError for settings that cannot be had.
    """
    if dtype not in ("bfloat16", "float32") or (engine == "byaldi" and dtype != "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is not bfloat16 (or, with engine='native', float32)")
    if engine == "byaldi":
        return ByaldiEncoder(model, device)
    if engine == "native":
        return ColPaliEncoder(model, device, dtype, batch_size)
    raise ValueError(f"engine {engine!r} is neither byaldi nor native")


def find_checkpoint(model: str | Path) -> Checkpoint:
    """Locate a checkpoint, downloading it when it is a hub id, and read its kind from its config.

    Raises ModelError when there is none, when it is not of the ColPali family or not in safetensors.
    """
    folder = _folder(model)
    base = None
    if (folder / "adapter_config.json").is_file():
        named = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not named:
            raise ModelError(f"{model}: adapter_config.json names no base model")
        base = _folder(named)
    config = _read_json((base or folder) / "config.json")
    model_class = MODEL_CLASSES.get(config.get("model_type", ""))
    if model_class is None:
        known = ", ".join(MODEL_CLASSES)
        raise ModelError(f"{model}: model_type {config.get('model_type')!r} is not of the ColPali family ({known})")
    checkpoint = Checkpoint(Path(str(model)).name, folder, base, model_class)
    for part in (folder, base):
        if part and not list(part.glob("*.safetensors")):
            raise ModelError(f"{model}: {part} holds no *.safetensors; pickled weights are not loaded")
    return checkpoint


def _folder(model: str | Path) -> Path:
    if Path(model).is_dir():
        return Path(model)
    if isinstance(model, Path) or str(model).startswith((".", "/", "~")) or str(model).count("/") != 1:
        raise ModelError(f"{model} is not a folder (nor a hub id, which looks like owner/name)")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:  # the hub client's errors share no base class with those of the network below it
        raise ModelError(f"{model} is not a folder, and the model hub did not give it: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.parent} is not a usable checkpoint: {path.name}: {error}") from error


def verify_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Raise ModelError unless the model's parameters are, value by value, the tensors of the checkpoint.

    Both ways: a tensor of the checkpoint that is no parameter was not loaded (a language-model head, which no
    retriever has, may be left out), and a parameter that is in no checkpoint file was made up.
    """
    from safetensors import safe_open

    parameters = {name: _digest(parameter) for name, parameter in model.named_parameters()}
    present = set(parameters.values())
    stored: set[bytes] = set()
    lost: list[str] = []
    for path in checkpoint.weight_files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                digest = _digest(file.get_tensor(key))
                stored.add(digest)
                if digest not in present and "lm_head" not in key:
                    lost.append(key)
    invented = [name for name, digest in parameters.items() if digest not in stored]
    if lost or invented:
        example = f"{lost[0]} was not loaded" if lost else f"{invented[0]} is not in the checkpoint"
        raise ModelError(
            f"{checkpoint.name}: the weights did not arrive: {len(lost)} tensors of the checkpoint are not in the "
            f"{type(model).__name__}, {len(invented)} of its parameters are not in the checkpoint ({example}). "
            "The key names may not fit the installed transformers and colpali-engine; use the pinned versions"
        )


def _digest(tensor: torch.Tensor) -> bytes:
    """A digest of the values as bfloat16, the coarsest type that weights are loaded in, whatever the shape."""
    import torch

    values = tensor.detach().to(torch.bfloat16).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values.data, digest_size=16).digest()


class ColPaliEncoder:
    """colpali-engine's model and processor, pages in batches of one size.

    dtype: "bfloat16" as byaldi uses, or "float32".
    """

    engine = "native"

    def __init__(self, model: str | Path, device: str = "auto", dtype: str = "bfloat16", batch_size: int = 8):
        ensure_torchvision()
        import torch
        from colpali_engine import models

        checkpoint = find_checkpoint(model)
        self.name, self.fingerprint = checkpoint.name, checkpoint.fingerprint()
        self.versions = _versions("colpali-engine", "transformers")
        self.dtype, self.batch_size = dtype, batch_size
        processor = (
            "ColQwen2_5_Processor" if checkpoint.model_class == "ColQwen2_5" else f"{checkpoint.model_class}Processor"
        )
        source = str(checkpoint.folder)
        try:
            with _quiet():
                self.model = getattr(models, checkpoint.model_class).from_pretrained(
                    source, dtype=getattr(torch, dtype)
                )
                self.processor = getattr(models, processor).from_pretrained(source)
        except Exception as error:  # a damaged checkpoint can fail anywhere in the libraries below
            raise ModelError(f"{model} cannot be loaded as {checkpoint.model_class}: {error}") from error
        verify_weights(self.model, checkpoint)
        self.model = self.model.eval().to(_device(device))

    def encode_pages(self, pages: Sequence[Page]) -> Iterator[tuple[Page, np.ndarray]]:
        """Embeddings of each page, pages of one size together; on a full GPU one by one."""
        import torch

        by_size = sorted(pages, key=lambda page: (page.size.width, page.size.height))
        for _, group in itertools.groupby(by_size, key=lambda page: page.size):
            for batch in _batches(group, self.batch_size):
                try:
                    arrays = self._encode([page.open_image() for page in batch])
                except torch.cuda.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    arrays = [array for page in batch for array in self._encode([page.open_image()])]
                yield from zip(batch, arrays, strict=True)

    def encode_query(self, text: str) -> np.ndarray:
        """Embeddings of one query, (tokens, dim); text beyond `MAX_QUERY_CHARS` is cut off."""
        return self._run(self.processor.process_queries([clean_query(text, self.processor.tokenizer)]))[0]

    def _encode(self, images: list) -> list[np.ndarray]:
        return self._run(self.processor.process_images(images))

    def _run(self, inputs: Any) -> list[np.ndarray]:
        import torch

        inputs = {
            key: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }
        with torch.inference_mode():
            embeddings = self.model(**inputs).float().cpu()
        if not inputs["attention_mask"].all():
            raise ModelError(f"{self.name}: pages of one size gave token sequences of several lengths")
        return [np.ascontiguousarray(array.numpy()) for array in embeddings]


class ByaldiEncoder:
    """byaldi's RAGMultiModalModel: pages are handed to its index one by one, in order, each under a number of ours.

    byaldi works in bfloat16, one page at a time. `rag` is the RAGMultiModalModel itself.
    """

    engine = "byaldi"
    dtype = "bfloat16"

    def __init__(self, model: str | Path, device: str = "auto"):
        ensure_torchvision()
        from byaldi import RAGMultiModalModel

        checkpoint = find_checkpoint(model)
        source = str(checkpoint.folder)
        taken_for = (
            "ColPali" if "colpali" in source.lower() else "ColQwen2" if "colqwen2" in source.lower() else "nothing"
        )
        if taken_for != checkpoint.model_class:
            raise ModelError(
                f"byaldi goes by the path and would take {source} for {taken_for}, but it is a "
                f"{checkpoint.model_class}; rename the folder (it knows colpali and colqwen2) or use engine='native'"
            )
        self.name, self.fingerprint = checkpoint.name, checkpoint.fingerprint()
        self.versions = _versions("byaldi", "colpali-engine", "transformers")
        try:
            with _quiet():
                self.rag = RAGMultiModalModel.from_pretrained(source, device=_device(device), verbose=0)
        except Exception as error:  # a damaged checkpoint can fail anywhere in the libraries below
            raise ModelError(f"{model} cannot be loaded by byaldi: {error}") from error
        verify_weights(self.rag.model.model, checkpoint)

    def encode_pages(self, pages: Sequence[Page]) -> Iterator[tuple[Page, np.ndarray]]:
        """Embeddings of each page, read off byaldi indexes of 32 pages."""
        wrong = next((page for page in pages if page.image_path.suffix.lower() not in _BYALDI_FORMATS), None)
        if wrong:
            raise ModelError(f"byaldi cannot open {wrong.image_path} of page {wrong.id!r}; use engine='native'")
        for batch in _batches(pages, _BYALDI_PAGES):
            yield from zip(batch, self._index([page.image_path for page in batch]), strict=True)

    def encode_query(self, text: str) -> np.ndarray:
        """Embeddings of one query, (tokens, dim); text beyond `MAX_QUERY_CHARS` is cut off."""
        text = clean_query(text, self.rag.model.processor.tokenizer)
        return self.rag.model.encode_query(text)[0].float().numpy()

    def _index(self, paths: list[Path]) -> list[np.ndarray]:
        model = self.rag.model
        with tempfile.TemporaryDirectory(prefix="vrag-byaldi-") as root, contextlib.redirect_stdout(io.StringIO()):
            model.index_root, model.index_name = root, None
            self._empty()
            self.rag.index(paths[0], index_name="pages", doc_ids=[0])
            if len(paths) > 1:
                self.rag.add_to_index(list(paths[1:]), False, doc_id=list(range(1, len(paths))))
        order = [model.embed_id_to_doc_id[i]["doc_id"] for i in range(len(model.indexed_embeddings))]
        if order != list(range(len(paths))):
            raise ModelError(f"byaldi indexed {len(paths)} pages as {order}")
        arrays = [embedding.float().numpy() for embedding in model.indexed_embeddings]
        self._empty()
        return arrays

    def _empty(self) -> None:
        """Forget what byaldi has indexed; the model stays loaded."""
        model = self.rag.model
        model.indexed_embeddings = []
        model.doc_ids = set()
        model.highest_doc_id = -1
        for mapping in (model.embed_id_to_doc_id, model.doc_ids_to_file_names, model.doc_id_to_metadata):
            mapping.clear()

    def search(self, text: str, embeddings: Iterable[np.ndarray], k: int) -> list[tuple[int, float]]:
        """byaldi's own search over page embeddings: (index, its score) of the best k, best first."""
        import torch

        model = self.rag.model
        model.indexed_embeddings = [torch.tensor(array, dtype=torch.bfloat16) for array in embeddings]
        model.embed_id_to_doc_id = {i: {"doc_id": i, "page_id": 1} for i in range(len(model.indexed_embeddings))}
        try:
            results = self.rag.search(clean_query(text, model.processor.tokenizer), k=k)
        finally:
            self._empty()
        return [(int(result.doc_id), float(result.score)) for result in results]


def clean_query(text: str, tokenizer: Any) -> str:
    """A query as text only: cut to `MAX_QUERY_CHARS`, special tokens such as image placeholders removed."""
    text = text[:MAX_QUERY_CHARS].encode("utf-8", "replace").decode()
    for token in sorted(tokenizer.all_special_tokens, key=len, reverse=True):
        text = text.replace(token, " ")
    return text


def _batches(pages: Iterable[Page], size: int) -> Iterator[list[Page]]:
    iterator = iter(pages)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _versions(*packages: str) -> dict[str, str]:
    return {package: metadata.version(package) for package in packages}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of a load."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
