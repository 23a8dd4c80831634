"""Settings, overrides and snapshots: one frozen dataclass per stage, every field documented with its unit.

    config = override(Config(), ["environment.max_turns=4", "seed=1"])
    save_config(config, run_folder)

The command line and the notebooks take the same `key=value` overrides; a run folder holds the JSON snapshot.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vrag_lib.minidocs_documents import MiniDocsConfig
from vrag_lib.provenance import provenance
from vrag_lib.settings import (
    KEY_REMEDY,
    ConfigError,
    check_device,
    check_key_name,
    check_settings,
    check_url,
    read_value,
    setting,
)

RETRIEVERS = ("text", "bm25", "dense", "visual", "remote")
POLICIES = ("extractive", "transformers", "openai")
DTYPES = ("auto", "float32", "bfloat16", "float16")
GIVEN = ("none", "retrieved", "gold_pages", "gold_regions")


@dataclass(frozen=True)
class CorpusConfig:
    """From files to pages."""

    dpi: int = setting(150, "resolution at which PDF pages are rendered, dots per inch", 1)
    workers: int = setting(2, "processes that render and read pages", 1)
    ocr: str = setting(
        "no_text",
        "pages to read by OCR: none, no_text (those without a text layer) or all",
        one_of=("none", "no_text", "all"),
    )

    def validate(self) -> None:
        """Raises ConfigError, naming the setting, for a value that it cannot have."""
        check_settings(self, "corpus")


@dataclass(frozen=True)
class RetrievalConfig:
    """How pages are found."""

    kind: str = setting("text", "text (the default fusion), bm25, dense, visual or remote", one_of=RETRIEVERS)
    model: str = setting("", "visual: path or hub id of a ColPali-family checkpoint; empty: the laptop's own")
    device: str = setting("auto", "visual: auto, cpu, cuda, or a card such as cuda:1")
    engine: str = setting(
        "byaldi",
        "visual: byaldi (one page at a time) or native (batches, the same embeddings)",
        one_of=("byaldi", "native"),
    )
    dtype: str = setting(
        "bfloat16", "visual: bfloat16 (byaldi takes nothing else) or float32", one_of=("bfloat16", "float32")
    )
    url: str = setting("", "remote: base URL of a search server")
    depth: int = setting(10, "pages per query that `vrag serve` answers with (the authors' server: 10)", 1)

    def validate(self) -> None:
        """Raises ConfigError, naming the setting, for a value that it cannot have, or not with the others."""
        check_settings(self, "retrieval")
        check_device("retrieval.device", self.device)
        if self.url:
            check_url("retrieval.url", self.url)
        if self.kind == "visual" and self.engine == "byaldi" and self.dtype != "bfloat16":
            raise ConfigError(
                f"retrieval.dtype={self.dtype} needs retrieval.engine=native; byaldi takes bfloat16 alone"
            )


@dataclass(frozen=True)
class EnvironmentConfig:
    """What the agent may do and what it sees. The same in training, evaluation and demo."""

    max_turns: int = setting(5, "replies per trajectory, the answer included (released code: 4 + 1 final)", 1)
    max_invalid_streak: int = setting(3, "invalid replies in a row that end a trajectory; 0: never", 0)
    allow_search: bool = setting(True, "whether the search action exists")
    allow_crop: bool = setting(True, "whether the crop action exists")
    min_pixels: int = setting(256 * 28 * 28, "least area of a shown image, pixels (256 vision tokens)", 1)
    max_pixels: int = setting(512 * 28 * 28, "largest area of a shown image, pixels (512 vision tokens)", 1)
    crop_padding: float = setting(0.0, "margin added round every crop box, shown pixels (released training: 0)", 0)
    search_depth: int = setting(10, "ranked pages asked of the retriever for each search", 1)
    given: str = setting(
        "none", "shown with the question: none, retrieved (by the question), gold_pages, gold_regions", one_of=GIVEN
    )
    given_pages: int = setting(0, "given=retrieved: pages shown with the question, the best first", 0)
    observation: str = setting(
        "image",
        "what a page is shown as: image, or text (its text layer or OCR; no crop then)",
        one_of=("image", "text"),
    )
    page_chars: int = setting(2048, "observation=text: longest text of one page, characters (about 512 tokens)", 1)

    def validate(self) -> None:
        """Raises ConfigError, naming the setting, for settings that exclude each other, else as `check_ranges`."""
        self.check_ranges()
        if (self.given == "retrieved") != (self.given_pages > 0):
            raise ConfigError(
                f"environment.given={self.given} and environment.given_pages={self.given_pages} exclude each other: "
                "given=retrieved needs at least one page, anything else 0"
            )
        if self.observation == "text" and (self.allow_crop or self.given == "gold_regions"):
            raise ConfigError(
                "environment.observation=text leaves nothing to crop: set environment.allow_crop=false and give no "
                "gold_regions"
            )

    def check_ranges(self) -> None:
        """Raises ConfigError, naming the setting, for a value that it cannot have by itself."""
        check_settings(self, "environment")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"environment.min_pixels={self.min_pixels} is more than environment.max_pixels={self.max_pixels}"
            )


@dataclass(frozen=True)
class PolicyConfig:
    """Who writes the replies."""

    kind: str = setting("extractive", "extractive, transformers, openai", one_of=POLICIES)
    model: str = setting("", "transformers: path or hub id; openai: the model's name at the endpoint")
    base_url: str = setting("", "openai: endpoint, up to and including /v1")
    api_key_env: str = setting("OPENAI_API_KEY", "openai: name of the environment variable that holds the key")
    temperature: float = setting(1.0, "sampling temperature; 0 is greedy", 0)
    top_p: float = setting(1.0, "nucleus of the sampling distribution")
    max_reply_tokens: int = setting(2048, "longest reply, tokens (paper Table 6)", 1)
    max_context_tokens: int = setting(10240, "longest context with its reply, tokens, image tokens counted", 1)
    batch_size: int = setting(8, "conversations generated together", 1)
    device: str = setting("auto", "auto, cpu, cuda, or a card such as cuda:1")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16", one_of=DTYPES)

    def validate(self) -> None:
        """Raises ConfigError, naming the setting, for a value that it cannot have or a key in place of its variable."""
        check_settings(self, "policy")
        check_device("policy.device", self.device)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"policy.top_p is more than 0 and at most 1, not {self.top_p}")
        if self.base_url:
            check_url("policy.base_url", self.base_url, KEY_REMEDY)
        check_key_name("policy.api_key_env", self.api_key_env)


@dataclass(frozen=True)
class RolloutConfig:
    """What samples the replies of a `policy.kind=transformers`, in evaluation and in rollouts of GRPO."""

    engine: str = setting("transformers", "transformers, or vllm (package of its own; paged, continuous batches)")
    merge_adapter: bool = setting(
        False, "vllm: send weights with LoRA added, not the adapter; the matrix keeps models so, too; faster on a CPU"
    )
    gpu_memory_utilization: float = setting(0.4, "vllm, GPU: share of the card it takes, weights included (paper: 0.6)")
    sleep: bool = setting(True, "vllm, GPU: free its memory for the trainer between rollouts")
    enforce_eager: bool = setting(False, "vllm, GPU: no CUDA graphs: starts sooner, samples slower; always so on a CPU")
    cpu_cache_mib: int = setting(512, "vllm, CPU: memory for keys and values, MiB")

    def validate(self) -> None:
        """Raises ConfigError, naming the setting, for an unknown engine or sizes that leave it no memory."""
        if self.engine not in ("transformers", "vllm"):
            raise ConfigError(f"rollout.engine is one of transformers, vllm, not {self.engine!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"rollout.gpu_memory_utilization is a share in (0, 1], not {self.gpu_memory_utilization}")
        if self.cpu_cache_mib < 1:
            raise ConfigError(f"rollout.cpu_cache_mib is at least 1, not {self.cpu_cache_mib}")


LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Every matrix of the language model; the vision tower has leaves of the same names and is left out."""


@dataclass(frozen=True)
class SynthesisConfig:
    """Multi-expert sampling of the cold-start data (paper §2.2; its numbers of samples are the authors', issue 21)."""

    experts: str = setting("scripted", "scripted (MiniDocs only) or openai")
    planner: str = setting("", "openai: the planner's model at policy.base_url (paper: Qwen-VL-Max)")
    grounder: str = setting("", "openai: the grounding expert's model there (paper: Qwen2.5-VL-72B-Instruct)")
    variant: str = setting("relocate", "relocate (paper), next_reply (released code), planner or grounder alone")
    oracle_pages: bool = setting(False, "show gold pages first if they rank at all (released code, trap T20)")
    samples_per_question: int = setting(2, "trajectories sampled per question")
    temperature: float = setting(1.0, "openai: sampling temperature of the planner")
    trajectories: int = setting(3000, "trajectories kept for SFT at most, after filters and balance")
    rl_questions: int = setting(2000, "questions set apart for reinforcement learning, of other documents")
    documents: int = setting(650, "MiniDocs training documents that both are drawn from; other datasets give all")
    concurrency: int = setting(8, "openai: requests under way at once")
    dataset: str | None = setting(None, "trained on: none (MiniDocs), slidevqa, vidoseek, mmlongbench_doc or unified")
    dataset_path: str | None = setting(None, "its folder of documents and questions; none: a public one is fetched")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning; the defaults are the paper's (Table 5)."""

    epochs: float = setting(3.0, "passes over the trajectories")
    batch_size: int = setting(16, "trajectories per optimizer step, over all processes")
    micro_batch_size: int = setting(1, "trajectories per forward pass and process")
    learning_rate: float = setting(1e-5, "peak learning rate of AdamW (LoRA: about ten times as much)")
    warmup_ratio: float = setting(0.1, "share of the steps over which the learning rate rises")
    schedule: str = setting("cosine", "after the warm-up: cosine, linear or constant_with_warmup")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    max_tokens: int = setting(16384, "longer trajectories are left out, tokens, image tokens counted (paper: cutoff)")
    train_invalid: bool = setting(False, "whether replies that were invalid are trained on, too")
    lora_rank: int = setting(0, "rank of the LoRA adapter; 0 trains all weights (paper: full)")
    lora_alpha: int = setting(64, "LoRA's scale: the update is multiplied by alpha over rank")
    lora_targets: str = setting(LORA_TARGETS, "regular expression of the modules that get an adapter")
    freeze_vision: bool = setting(True, "whether vision tower and projector stay as they are (paper: frozen)")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, a third more time")
    save_steps: int = setting(50, "optimizer steps between checkpoints, and between validations")
    keep_checkpoints: int = setting(2, "newest checkpoints kept")


@dataclass(frozen=True)
class GRPOConfig:
    """Reinforcement learning; the defaults are the paper's (Table 6) or, where it is silent, the released script's.

    Deviations: one optimizer step on all 160 trajectories of a rollout. The paper names a mini-batch of 64, the script
    takes five steps on 32 each (`updates_per_step=5`), and groups are not split here. `micro_batch_size` is the
    script's 1 (paper: 2), which changes no gradient.
    """

    recipe: str = setting("paper", "reward: one of rewards.RECIPES, or weights of nDCG, answer, pattern: 0.2,0.8,0")
    steps: int = setting(62, "rollouts: each samples questions_per_step x group_size trajectories")
    questions_per_step: int = setting(32, "questions per rollout, over all processes")
    group_size: int = setting(5, "trajectories per question")
    updates_per_step: int = setting(1, "optimizer steps per rollout, each on whole groups (released code: 5)")
    iterations: int = setting(1, "times a rollout is trained on")
    micro_batch_size: int = setting(1, "trajectories per forward pass and process")
    learning_rate: float = setting(1e-6, "peak learning rate of AdamW (LoRA: about ten times as much)")
    warmup_steps: int = setting(
        18, "optimizer steps over which the learning rate rises (paper: 0.285 of them; script: 5)"
    )
    schedule: str = setting("constant_with_warmup", "after the warm-up: constant_with_warmup, linear or cosine")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    advantage: str = setting("group", "baseline of a reward: group (mean of the group) or leave_one_out")
    advantage_std: bool = setting(True, "group: divide by the standard deviation of the group's rewards")
    invalid_advantage: float | None = setting(
        None, "of invalid replies' tokens; none: their trajectory's own, as the paper"
    )
    normalisation: str = setting("sequence", "weight of a token: sequence, token or constant (advantages.loss_weights)")
    constant_length: int = setting(2048, "normalisation=constant: tokens that each trajectory is divided by")
    clip_low: float = setting(0.2, "the ratio of an unwelcome token is not followed below 1 - clip_low")
    clip_high: float = setting(0.2, "the ratio of a welcome token is not followed above 1 + clip_high")
    kl_coefficient: float = setting(0.01, "weight of the KL to the reference in the loss; 0 leaves the reference out")
    kl_clamp: float = setting(10.0, "largest KL of one token, nats")
    old_logprobs: str = setting("trainer", "denominator of the ratio: trainer (recomputed before training) or sampler")
    resample_rounds: int = setting(0, "times that groups whose rewards are all equal are replaced by other questions")
    mask_broken: bool = setting(True, "do not train on trajectories that ended in an error or a full context")
    temperature: float = setting(1.0, "sampling temperature")
    max_reply_tokens: int = setting(2048, "longest reply, tokens")
    max_context_tokens: int = setting(10240, "longest context with its reply, tokens, image tokens counted")
    max_sampled_tokens: int | None = setting(
        None, "tokens sampled in one trajectory after which it stops; none: no limit"
    )
    rollout_batch_size: int = setting(16, "conversations generated together, per process")
    lora_rank: int = setting(64, "rank of the LoRA adapter; 0 trains all weights (paper: full)")
    lora_alpha: int = setting(64, "LoRA's scale: the update is multiplied by alpha over rank")
    lora_targets: str = setting(LORA_TARGETS, "regular expression of the modules that get an adapter")
    freeze_vision: bool = setting(True, "whether vision tower and projector stay as they are")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, a third more time")
    save_steps: int = setting(25, "rollouts between checkpoints")
    keep_checkpoints: int = setting(2, "newest checkpoints kept")

    @property
    def rows(self) -> int:
        """Trajectories per rollout."""
        return self.questions_per_step * self.group_size

    def validate(self, processes: int = 1) -> None:
        """Raises ValueError, naming the setting, when the numbers do not fit each other or `processes`."""
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: an advantage needs at least two trajectories per question")
        if self.updates_per_step > 1 and self.questions_per_step % (self.updates_per_step * processes):
            raise ValueError(
                f"questions_per_step={self.questions_per_step} is not a multiple of updates_per_step x processes = "
                f"{self.updates_per_step} x {processes}, and a group is not split over optimizer steps"
            )
        if self.rows % (self.updates_per_step * self.micro_batch_size * processes):
            raise ValueError(
                f"{self.rows} trajectories per rollout are not a multiple of updates_per_step x micro_batch_size x "
                f"processes = {self.updates_per_step} x {self.micro_batch_size} x {processes}"
            )
        if self.temperature <= 0:
            raise ValueError("temperature=0 is greedy: all trajectories of a group would be the same")
        for name, allowed in (
            ("advantage", ("group", "leave_one_out")),
            ("normalisation", ("sequence", "token", "constant")),
            ("old_logprobs", ("trainer", "sampler")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class Config:
    """Everything one run depends on."""

    preset: str = setting("laptop", "name of the preset this started from")
    seed: int = setting(0, "seed of everything random")
    results: str = setting("results", "folder that results/<preset>/<stage>/ is written in")
    smoke: bool = setting(False, "shrink every run to seconds: for tests of the pipeline, not for results")
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    minidocs: MiniDocsConfig = field(default_factory=MiniDocsConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)

    def folder(self, stage: str) -> Path:
        """Where the results of one stage lie."""
        return Path(self.results) / self.preset / stage


def override(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """The config with `key=value` overrides applied, the later one winning.

    Raises ConfigError for an unknown key (with the nearest known one), a value of the wrong kind, and for values of
    `corpus`, `retrieval`, `environment` and `policy` that these cannot have: here, before anything is made with them.
    """
    wanted: dict[str, Any] = {}
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"an override is written key=value, for example seed=1; got {text!r}")
        if key.strip() == "preset":
            raise ConfigError(f"a preset is not overridden but chosen: --preset {value.strip()}")
        _read_into(wanted, config, key.strip().split("."), value.strip(), key.strip())
    config = _replaced(config, wanted)
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed lies between 0 and 2^32 - 1, not at {config.seed}")
    config.corpus.validate()
    config.retrieval.validate()
    config.environment.check_ranges()
    config.policy.validate()
    return config


def _replaced(node: Any, wanted: Mapping[str, Any]) -> Any:
    """All settings of a stage at once: some are checked against one another."""
    changes = {
        name: _replaced(getattr(node, name), value) if isinstance(value, dict) else value
        for name, value in wanted.items()
    }
    return dataclasses.replace(node, **changes)


def _read_into(wanted: dict[str, Any], node: Any, path: list[str], value: str, key: str) -> None:
    """Puts the value of a key into `wanted`, which is nested like the config `node`."""
    names = {f.name: f for f in dataclasses.fields(node)}
    if path[0] not in names:
        stage, rest = key.removesuffix(".".join(path)), path[1:]
        near = [name for name, _, _ in _settings(Config()) if name.endswith(f".{key}")]  # its stage was left out
        near = near or [stage + ".".join([name, *rest]) for name in difflib.get_close_matches(path[0], names, n=1)]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known here: {', '.join(names)}"
        raise ConfigError(f"there is no setting {key!r}; {hint}")
    current = getattr(node, path[0])
    if dataclasses.is_dataclass(current):
        if len(path) == 1:
            inner = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(current))
            raise ConfigError(f"{key!r} is a stage, not a setting; its settings are {inner}")
        _read_into(wanted.setdefault(path[0], {}), current, path[1:], value, key)
        return
    if len(path) > 1:
        raise ConfigError(f"there is no setting {key!r}: {path[0]!r} has no parts")
    kind = typing.get_type_hints(type(node))[path[0]]
    wanted[path[0]] = read_value(value, kind, key)


def _settings(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Key, value and documentation of every setting below a config or one of its stages."""
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f.metadata["doc"]


def setting_names() -> frozenset[str]:
    """The key of every setting, as overrides name it."""
    return frozenset(name for name, _, _ in _settings(Config()))


def describe(config: Config | None = None) -> str:
    """Every setting with its value and documentation, one line each; what `vrag config` prints."""
    return "\n".join(f"{key}={value}  # {doc}" for key, value, doc in _settings(config or Config()))


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(data: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. Raises ConfigError for a key this version does not know."""

    def build(cls: type, values: dict[str, Any]) -> Any:
        known = typing.get_type_hints(cls)
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"a snapshot of another version: {cls.__name__} has no {', '.join(unknown)}")
        return cls(**{k: build(known[k], v) if dataclasses.is_dataclass(known[k]) else v for k, v in values.items()})

    return build(Config, data)


def save_config(config: Config, folder: str | Path) -> Path:
    """Write `config.json`, the snapshot with its provenance, into a run folder."""
    path = Path(folder) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": to_dict(config), "provenance": provenance(config.seed)}, indent=1) + "\n")
    return path


def read_config(folder: str | Path) -> Config:
    """The config of a run folder. Raises ConfigError when there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no config.json; is it a run folder?")
    return from_dict(json.loads(path.read_text())["config"])


def cache_dir() -> Path:
    """Where rendered pages, OCR and embeddings are kept: `$VRAG_CACHE`, else `~/.cache/vrag_lib`."""
    return Path(os.environ.get("VRAG_CACHE") or Path.home() / ".cache" / "vrag_lib")
