"""The experiments of the paper's tables and figures, and the ablations nobody published, as data: one `Cell` each.

    CELLS["vrag_rl"]                       # chain sft+grpo, agent vrag_rl, nothing overridden
    cell_config(CELLS["no_kl"], config)    # the config with that cell's overrides

`matrix` runs them, `paper_tables` compares them. All trained cells share questions, trajectories, budget (trajectories
sampled) and, unless the reward is what is compared, the reward; what two cells of a comparison differ in is checked by
a test. The paper compares Search-R1-VL, which had no SFT and no crop, with VRAG-RL, which had both (Table 1); the cell
`sft_rl_search` (SFT and no crop) and the cell `cold_start` (crop and no SFT) take the two apart.

Deviations. The paper's untrained rows are an instruct model that follows a prompt; the scale policy was never taught
to, so cells without SFT start from it after `format`: SFT on a few right trajectories of each kind of agent
(`matrix_training.FORMS`). Agents given the gold pages or regions start after `gold`: SFT on right trajectories of
experts given the same. `gold_regions` is what perception allows, an upper bound. On the laptop preset `gold_pages` and
`gold_pages_crop` bound nothing: its policy cannot read whole pages, and the expert of the second is the scripted
planner alone, which points badly; RL teaches better. Cells with SFT start from the policy as it comes; `raw` measures
that. The paper trains without SFT by other settings (reward `paper_cold_start`, no KL); here `search_r1` and
`cold_start` keep those of the rest, for the comparison's sake, and `cold_start_paper` has them. Cells without crop are
fine-tuned on trajectories of experts without crop, on the same questions; `no_crop_same_sft` begins with VRAG-RL's own
SFT instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vrag_lib.agents import AGENTS, Agent, agent_environment, find_agent
from vrag_lib.config import Config, ConfigError, override

CHAINS = ("none", "sft", "grpo", "sft+grpo")
"""What a cell's policy went through, after `format` or `gold` where there is no SFT."""

CONTEXT_PAGES = (1, 2, 3, 4, 5, 6, 10)
"""Pages in context: those of the paper's Figure 3, and 10 as ViDoRAG retrieves."""


@dataclass(frozen=True)
class Cell:
    """One experiment.

    agent: what the policy may do in RL and evaluation, by name or, for numbers of pages without one, itself.
    overrides: `key=value` settings of RL and evaluation that differ from the preset's.
    data: trajectories of SFT, by experts that may `crop` or only `search`, or were given the `gold` pages or regions.
    trajectories: the first so many; None: all.
    group_size: trajectories per question in RL, from fewer or more questions, so that the budget stays.
    formatted: whether a cell without SFT starts after `format` or `gold`, or from the policy as it comes.
    """

    name: str
    about: str
    agent: str | Agent = "vrag_rl"
    chain: str = "none"
    overrides: tuple[str, ...] = ()
    data: str = "crop"
    trajectories: int | None = None
    group_size: int | None = None
    formatted: bool = True

    @property
    def starts_formatted(self) -> bool:
        """Whether its chain begins after the stage `format` or `gold`."""
        return self.formatted and not self.chain.startswith("sft")

    @property
    def trained(self) -> bool:
        """Whether a stage of the chain trains it, so that it has several seeds."""
        return self.chain != "none"

    def find_agent(self) -> Agent:
        """The agent itself. Raises ConfigError for an unknown name."""
        return self.agent if isinstance(self.agent, Agent) else find_agent(self.agent)

    def seeds(self, count: int) -> range:
        """Seeds it is run with: `count` of training, or one, evaluation being greedy."""
        return range(count if self.trained else 1)


def _pages(k: int) -> Agent:
    name = f"vanilla_rag_{k}"
    return AGENTS.get(name) or Agent(name, given="retrieved", given_pages=k)


def _search(name: str, about: str, chain: str, **settings) -> Cell:
    return Cell(name, about, "search_r1", chain, data="search", **settings)


def _variant(name: str, about: str, *overrides: str, chain: str = "sft+grpo", **settings) -> Cell:
    return Cell(name, about, "vrag_rl", chain, overrides, **settings)


_UNTRAINED = (
    Cell("raw", "the policy as it comes, taught no action", formatted=False),
    Cell("no_retrieval", "no page at all (lower bound)", "no_retrieval"),
    *(Cell(f"vanilla_rag_{k}", f"{k} page{'s' * (k > 1)} found with the question", _pages(k)) for k in CONTEXT_PAGES),
    Cell("vanilla_rag_5_text", "5 pages found with the question, as text", "vanilla_rag_5_text"),
    Cell("react", "searches, not trained to", "react"),
    Cell("react_text", "searches in text, not trained to", "react_text"),
    Cell("vrag_prompted", "searches and crops, not trained to", "vrag_rl"),
    Cell("gold_pages", "the gold pages, whole", "gold_pages", data="gold"),
    Cell("gold_pages_crop", "the gold pages, with crop", "gold_pages_crop", data="gold"),
    Cell("gold_regions", "the gold regions, cut out (upper bound)", "gold_regions", data="gold"),
)

_TUNED = (
    Cell("sft", "SFT alone", chain="sft"),
    _search("sft_search", "SFT alone, no crop", "sft"),
    Cell("sft_300", "SFT alone on 300 trajectories", chain="sft", trajectories=300),
    Cell("sft_1000", "SFT alone on 1,000 trajectories", chain="sft", trajectories=1000),
)

_COMPARED = (
    _variant("vrag_rl", "SFT, RL with VRAG-RL's reward, crop"),
    _search("search_r1", "no SFT, RL with VRAG-RL's reward, no crop", "grpo"),
    _search("sft_rl_search", "SFT, RL with VRAG-RL's reward, no crop", "sft+grpo"),
    _variant("cold_start", "no SFT, RL with VRAG-RL's reward, crop", chain="grpo"),
    _variant("vrag_answer_only", "SFT, RL with the answer's reward alone, crop", "grpo.recipe=answer_only"),
    _search(
        "search_answer_only", "SFT, RL with the answer's reward alone, no crop", "sft+grpo",
        overrides=("grpo.recipe=answer_only",),
    ),
)  # fmt: skip

_ABLATIONS = (
    _variant("retrieval_only", "SFT, RL with the reward of nDCG alone, crop", "grpo.recipe=retrieval_only"),
    _variant("released_code", "reward: the released code's, gated", "grpo.recipe=released_code"),
    _variant("no_gate", "reward: the released code's without its gate", "grpo.recipe=paper_cold_start"),
    _variant(
        "cold_start_paper", "no SFT, the paper's settings for that", "grpo.recipe=paper_cold_start",
        "grpo.kl_coefficient=0", chain="grpo",
    ),
    Cell("no_crop_same_sft", "VRAG-RL's SFT, then RL without crop", "search_r1", "sft+grpo"),
    _variant("group_2", "groups of 2, as many trajectories", group_size=2),
    _variant("group_10", "groups of 10, as many trajectories", group_size=10),
    _variant("no_kl", "no KL to the reference", "grpo.kl_coefficient=0"),
    _variant("invalid_penalised", "SFT, RL that penalises invalid replies, crop", "grpo.invalid_advantage=-1"),
    _variant("padding_8", "crops 8 shown pixels wider on each side", "environment.crop_padding=8"),
    _variant("horizon_3", "3 replies at most", "environment.max_turns=3"),
    _variant("horizon_8", "8 replies at most", "environment.max_turns=8"),
    _variant("rl_300", "SFT on 300 trajectories, then RL", trajectories=300),
    _variant("rl_1000", "SFT on 1,000 trajectories, then RL", trajectories=1000),
    Cell(
        "search_r1_text", "no SFT, RL with VRAG-RL's reward, no crop, pages as text", "search_r1_text", "grpo",
        data="search",
    ),
)  # fmt: skip

FAMILIES = {
    "reward": ("vrag_rl", "vrag_answer_only", "retrieval_only", "released_code", "no_gate", "invalid_penalised"),
    "crop": ("vrag_rl", "sft_rl_search", "search_answer_only", "no_crop_same_sft", "padding_8"),
    "cold start": ("vrag_rl", "rl_1000", "rl_300", "cold_start", "cold_start_paper", "search_r1", "search_r1_text"),
    "group size, KL, horizon": ("vrag_rl", "group_2", "group_10", "no_kl", "horizon_3", "horizon_8"),
}
"""The cells that RL trains, by what they vary, each beside the one they vary."""

CELLS: dict[str, Cell] = {cell.name: cell for cell in (*_UNTRAINED, *_TUNED, *_COMPARED, *_ABLATIONS)}
"""Every cell by its name, the cheap ones first: within a seed they are run in this order."""


def find_cells(names: Sequence[str] | None = None) -> list[Cell]:
    """The cells of these names in the order of the matrix; all without names. Raises ConfigError for an unknown one."""
    unknown = [name for name in names or () if name not in CELLS]
    if unknown:
        raise ConfigError(f"there is no cell {unknown[0]!r}; cells are {', '.join(CELLS)}")
    return [cell for cell in CELLS.values() if not names or cell.name in names]


def cell_config(cell: Cell, config: Config) -> Config:
    """The config of a cell's RL and evaluation: its overrides, and the environment of its agent.

    Raises ConfigError for a setting that does not exist or contradicts the agent, and for a budget that the group size
    does not divide.
    """
    own = override(config, cell.overrides)
    if cell.group_size is not None:
        questions, left = divmod(own.grpo.rows, cell.group_size)
        if left:
            raise ConfigError(
                f"{own.grpo.rows} trajectories per rollout are no whole number of groups of {cell.group_size}; change "
                "grpo.questions_per_step or leave the cell out"
            )
        own = replace(own, grpo=replace(own.grpo, group_size=cell.group_size, questions_per_step=questions))
    return replace(own, environment=agent_environment(cell.find_agent(), own))
