"""From a config to the objects it names: corpus, retriever, policy. The command line and the notebooks build through
here, so a setting means the same in both. Heavy libraries are imported only by what is chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vrag_lib.claims import model_fingerprint
from vrag_lib.config import Config, ConfigError, cache_dir
from vrag_lib.corpus import Corpus
from vrag_lib.policy import Policy
from vrag_lib.policy_chat import CheckpointError
from vrag_lib.retrieval import Retriever
from vrag_lib.scale_policy import AGENT, COLD_START, MAX_PIXELS, WEIGHTS, legible
from vrag_lib.torch_setup import ensure_torchvision

if TYPE_CHECKING:
    from vrag_lib.grpo import Sampler

SCALE_RETRIEVER = WEIGHTS.with_name("scale_retriever_colqwen2")
"""Where the laptop's trained ColQwen2 lies in the repository."""


def open_corpus(path: str | Path, config: Config) -> Corpus:
    """The pages of a folder or file, with OCR where the config wants it.

    Raises CorpusError when nothing there can be read, ConfigError for a setting that it cannot have.
    """
    settings = config.corpus
    settings.validate()
    corpus = Corpus.from_folder(path, dpi=settings.dpi, workers=settings.workers)
    if settings.ocr == "none":
        return corpus
    from vrag_lib.ocr import ocr_pages

    return ocr_pages(corpus, workers=settings.workers, pages=settings.ocr)


def require_retriever(config: Config) -> None:
    """Raises ConfigError or ModelError where `make_retriever` would for the settings alone: to be called before
    documents are rendered for it."""
    settings = config.retrieval
    settings.validate()
    if settings.kind == "remote" and not settings.url:
        raise ConfigError("retrieval.kind=remote needs retrieval.url=, the base URL of a search server")
    if settings.kind == "visual":
        from vrag_lib.page_encoder import find_checkpoint

        require_device("retrieval.device", settings.device)
        find_checkpoint(settings.model or laptop_colqwen2(allow_random=config.smoke))


def make_retriever(corpus: Corpus, config: Config) -> Retriever:
    """The retriever named by `retrieval.kind`, its index built or read from the cache.

    Raises ConfigError for a setting that it cannot have and for a model, url or device that is missing, ModelError for
    a model that it cannot use.
    """
    settings = config.retrieval
    require_retriever(config)
    if settings.kind == "text":
        from vrag_lib.text_retrieval import default_text_retriever

        return default_text_retriever(corpus)
    if settings.kind == "bm25":
        from vrag_lib.text_retrieval import BM25Retriever

        return BM25Retriever.from_corpus(corpus)
    if settings.kind == "dense":
        from vrag_lib.text_retrieval import DenseRetriever

        return DenseRetriever.from_corpus(corpus)
    if settings.kind == "visual":
        from vrag_lib.visual_retrieval import VisualRetriever

        model = settings.model or laptop_colqwen2(allow_random=config.smoke)
        return VisualRetriever.build(
            corpus, model, engine=settings.engine, device=settings.device, dtype=settings.dtype
        )
    from vrag_lib.search_server import RemoteRetriever

    return RemoteRetriever(settings.url, corpus)


def retriever_fingerprint(config: Config) -> str:
    """What a visual retriever ranks with, by its weights (`claims.model_fingerprint`); empty where none are learnt."""
    if config.retrieval.kind != "visual":
        return ""
    return model_fingerprint(str(config.retrieval.model or SCALE_RETRIEVER))


def require_device(name: str, device: str) -> None:
    """Raises ConfigError, naming the setting, where torch has no CUDA device and `device` is one."""
    if not device.startswith("cuda"):
        return
    import torch

    if not torch.cuda.is_available():
        reason = "torch finds no GPU" if torch.version.cuda else "this torch is built without CUDA"
        raise ConfigError(f"{name}={device}, but {reason}; set {name}=cpu (or auto), or install a torch that has CUDA")


def laptop_colqwen2(allow_random: bool = False) -> Path:
    """The ColQwen2 that the laptop preset uses: the scale retriever that the repository ships. Where there is none,
    `allow_random` gives a tiny one with random weights, which shows that everything runs but finds nothing.

    Raises ConfigError where there is none, as when only the package was installed.
    """
    if (SCALE_RETRIEVER / "config.json").is_file():
        return SCALE_RETRIEVER
    if not allow_random:
        raise ConfigError(
            f"the laptop's visual retriever comes with the repository and is not at {SCALE_RETRIEVER}: run in a clone "
            "of it (pip install --editable), or name another with retrieval.model="
        )
    from vrag_lib.scale_model import build_tiny_colqwen2

    return build_tiny_colqwen2(cache_dir() / "models" / "tiny-colqwen2")


def scale_policy(config: Config | None = None) -> Path | None:
    """The scale policy that the repository ships: what the laptop's experiment starts from, for the size of print that
    the config's MiniDocs have (default: their own); None where it is absent."""
    return _shipped(WEIGHTS, config)


def scale_cold_start(config: Config | None = None) -> Path | None:
    """The same after SFT."""
    return _shipped(COLD_START, config)


def scale_agent(config: Config | None = None) -> Path | None:
    """The same after SFT and RL."""
    return _shipped(AGENT, config)


def _shipped(folder: Path, config: Config | None) -> Path | None:
    if config is not None and config.minidocs.text_px is not None:
        folder = legible(folder)
    return folder if (folder / "config.json").is_file() else None


def require_policy(config: Config) -> None:
    """Raises ConfigError where `make_policy` would for the settings alone: to be called before documents are rendered
    for it."""
    settings = config.policy
    settings.validate()
    config.rollout.validate()
    if settings.kind == "openai" and not (settings.base_url and settings.model):
        raise ConfigError("policy.kind=openai needs policy.base_url= (…/v1) and policy.model=")
    if settings.kind == "transformers":
        if not _policy_model(config):
            raise ConfigError("policy.kind=transformers needs policy.model=, a path or hub id of a Qwen2-VL-type model")
        require_device("policy.device", settings.device)
        if config.rollout.engine == "vllm":
            from vrag_lib.policy_vllm import require_vllm

            require_vllm()


def _policy_model(config: Config) -> str | Path | None:
    """The checkpoint that is named, else the scale policy where pages are shown at its size: it reads MiniDocs alone,
    and pages of other documents are shown larger."""
    fits = config.environment.max_pixels <= MAX_PIXELS
    return config.policy.model or (scale_policy(config) if fits else None)


def make_policy(corpus: Corpus, config: Config) -> Policy:
    """The policy named by `policy.kind`; `transformers` samples with the engine that `rollout.engine` names.

    Raises ConfigError for a setting that it cannot have and for a model, endpoint, device or package that is missing,
    CheckpointError for a model that cannot be loaded.
    """
    settings = config.policy
    require_policy(config)
    limits = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_reply_tokens": settings.max_reply_tokens,
    }
    if settings.kind == "extractive":
        from vrag_lib.policy_extractive import ExtractivePolicy

        return ExtractivePolicy(corpus)
    if settings.kind == "openai":
        from vrag_lib.policy_openai import OpenAIPolicy

        return OpenAIPolicy(corpus, settings.base_url, settings.model, api_key_env=settings.api_key_env, **limits)
    model = _policy_model(config)
    limits |= {"max_context_tokens": settings.max_context_tokens, "batch_size": settings.batch_size}
    where = {"device": settings.device, "dtype": settings.dtype}
    if config.rollout.engine == "vllm":
        from vrag_lib.policy_vllm import VLLMPolicy

        return VLLMPolicy.from_pretrained(model, corpus, config.rollout, **where, **limits)
    from vrag_lib.policy_transformers import TransformersPolicy

    return TransformersPolicy.from_pretrained(model, corpus, **where, **limits)


def image_pixels(model: str | Path) -> tuple[int, int] | None:
    """Least and largest area, in pixels, that the image processor of a checkpoint (folder or hub id) gives an image;
    None where it names none. A model that reads only what it was trained on says so there.

    Raises CheckpointError when there is no such processor.
    """
    ensure_torchvision()
    from transformers import AutoImageProcessor

    from vrag_lib.training import checkpoint_and_adapter

    checkpoint, _ = checkpoint_and_adapter(model)
    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint, local_files_only=Path(checkpoint).is_dir())
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{model} cannot be loaded as a Qwen2-VL-type checkpoint: {error}") from error
    least, most = (processor.size.get(name) for name in ("shortest_edge", "longest_edge"))
    return (least, most) if least and most else None


def make_sampler(checkpoint: str | Path, corpus: Corpus, config: Config) -> Sampler | None:
    """Who samples the rollouts of GRPO from a checkpoint, as `rollout.engine` names it; None is the model under
    training itself.

    Raises ConfigError for an unknown engine or one whose package is missing.
    """
    config.rollout.validate()
    if config.rollout.engine == "transformers":
        return None
    from vrag_lib.vllm_weights import VLLMSampler

    return VLLMSampler(checkpoint, corpus, config.rollout)
