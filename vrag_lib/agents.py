"""The agents that the paper's Table 1 compares, and their bounds, as data: one environment and one loop run them all.

    environment = agent_environment("vanilla_rag_5", config)
    evaluate_datasets({"minidocs": None}, config, agent="react_text")

| agent | row of Table 1 | may | is given with the question |
|---|---|---|---|
| `no_retrieval` | | answer | nothing |
| `vanilla_rag_k`, `vanilla_rag_k_text` | Vanilla RAG, visual and OCR | answer | k = 1, 3, 5 or 10 pages found with it |
| `react`, `react_text` | ReAct, visual and OCR | search, answer | nothing |
| `search_r1`, `search_r1_text` | Search-R1-VL and Search-R1 | as `react`, of which only training tells them | nothing |
| `vrag_rl` | VRAG-RL | search, crop, answer | nothing |
| `gold_pages`, `gold_pages_crop` | | answer, the second also crop | the gold pages |
| `gold_regions` | | answer | the gold regions, each cut out as a crop |

An agent is what a policy may do and see. `react` is a policy that was prompted, `search_r1` one that was trained with
the same actions: evaluate another checkpoint. The prompt follows from what an agent may do (`actions.question_prompt`).

Deviations: the paper says neither how many pages Vanilla RAG is given nor in what order; here k is part of the name,
and the best page comes first. All agents have the same budget: a baseline that can only answer may try again after a
message that held no answer. Text is the page's own layer where it has one and OCR else (paper: OCR of every page, here
`corpus.ocr=all`), cut to `environment.page_chars`; a search in text shows one page, as it does in images. The bounds
are not in Table 1. The format gate (`judge_gated`) asks for a search, so agents that cannot search have 0 there; a gold
region is no page, so `gold_regions` has shown no page. Where several images are given, a crop refers to the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from vrag_lib.config import Config, ConfigError, EnvironmentConfig
from vrag_lib.corpus import Question


@dataclass(frozen=True)
class Agent:
    """What an agent may do and what it is shown; all fields but `name` are those of `EnvironmentConfig`.

    given: `none`, `retrieved` (`given_pages` pages found with the question as asked), `gold_pages` or `gold_regions`.
    observation: pages are shown as `image` or as `text`.
    """

    name: str
    allow_search: bool = False
    allow_crop: bool = False
    given: str = "none"
    given_pages: int = 0
    observation: str = "image"

    def settings(self) -> dict[str, bool | int | str]:
        """The fields of `EnvironmentConfig` that the agent decides."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "name"}


VANILLA_PAGES = (1, 3, 5, 10)
"""Pages that the variants of Vanilla RAG are given."""

_ALL = (
    Agent("no_retrieval"),
    *(Agent(f"vanilla_rag_{k}", given="retrieved", given_pages=k) for k in VANILLA_PAGES),
    *(Agent(f"vanilla_rag_{k}_text", given="retrieved", given_pages=k, observation="text") for k in VANILLA_PAGES),
    Agent("react", allow_search=True),
    Agent("react_text", allow_search=True, observation="text"),
    Agent("search_r1", allow_search=True),
    Agent("search_r1_text", allow_search=True, observation="text"),
    Agent("vrag_rl", allow_search=True, allow_crop=True),
    Agent("gold_pages", given="gold_pages"),
    Agent("gold_pages_crop", given="gold_pages", allow_crop=True),
    Agent("gold_regions", given="gold_regions"),
)

AGENTS: dict[str, Agent] = {agent.name: agent for agent in _ALL}
"""Every agent by its name."""


def find_agent(name: str) -> Agent:
    """The agent of that name. Raises ConfigError, listing the names, when there is none."""
    if name not in AGENTS:
        raise ConfigError(f"there is no agent {name!r}; agents are {', '.join(AGENTS)}")
    return AGENTS[name]


def agent_environment(agent: str | Agent, config: Config) -> EnvironmentConfig:
    """The environment of an agent: what it decides is taken from it, all else (budget, image sizes) from the config.

    Raises ConfigError for an unknown name, and for a setting of the config that was changed to something else than the
    agent has: neither may silently win.
    """
    agent = find_agent(agent) if isinstance(agent, str) else agent
    default = EnvironmentConfig()
    for name, wanted in agent.settings().items():
        value = getattr(config.environment, name)
        if value not in (wanted, getattr(default, name)):
            raise ConfigError(
                f"environment.{name}={value} contradicts the agent {agent.name!r}, which has {wanted}; leave the "
                "setting out or choose another agent"
            )
    environment = dataclasses.replace(config.environment, **agent.settings())
    environment.validate()
    return environment


def questions_for(agent: Agent, questions: Sequence[Question]) -> tuple[Question, ...]:
    """The questions that an agent can be asked: all, but for gold regions those whose regions are known.

    Raises ValueError when none is left.
    """
    if agent.given != "gold_regions":
        return tuple(questions)
    known = tuple(question for question in questions if question.gold_regions)
    if not known:
        raise ValueError(f"the agent {agent.name!r} needs gold regions, and no question of these has any")
    return known
