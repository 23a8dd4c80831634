"""What the paper (arXiv 2505.22019) and an independent re-run of it (the SCORE paper) measured, and the effects that
they claim, as data. `paper_tables` puts our own numbers beside them.

All accuracies are in percent, judged by a model, without intervals: neither source gives any. SCORE ran VRAG-RL-7B and
its baselines on one merged corpus with another retriever (ColQwen2.5) and another judge (qwen-max). Numbers of
Figures 4 to 6 are not printed in the paper; of these only the direction of an effect is known. Those of Figure 3 were
read off the picture, and which belongs to which number of pages was inferred from the text.

`EFFECTS` is what gets tested, each a difference of two cells of the matrix. They were written down before anything was
run, but for what counts as an invalid action: first invalid replies alone, which are an ablation now; that wrong crops
and answers before any page belong to it was seen when numbers were there. What else was added late says so in its note.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER_OVERALL = {
    "vanilla_rag_5_text": ("OCR Vanilla RAG", 20.9, 11.2),
    "react_text": ("OCR ReAct", 15.8, 8.4),
    "search_r1_text": ("OCR Search-R1", 22.2, 14.1),
    "vanilla_rag_1": ("Vanilla RAG", 24.2, 13.2),
    "react": ("ReAct", 26.9, 10.9),
    "search_r1": ("Search-R1-VL", 37.4, 21.3),
    "vrag_rl": ("VRAG-RL", 57.1, 53.5),
}
"""Table 1, column overall: the paper's name, 7B, 3B. The text says 34.7 for Search-R1-VL-7B, the table 37.4."""

PAPER_BY_TYPE = {
    "vanilla_rag_5_text": (26.1, 10.6, 8.5, 5.4, 11.7, 3.3),
    "react_text": (21.2, 13.3, 5.9, 5.1, 7.3, 1.7),
    "search_r1_text": (28.4, 19.7, 9.9, 6.0, 7.9, 5.9),
    "vanilla_rag_1": (29.1, 17.4, 13.1, 14.7, 15.9, 7.6),
    "react": (34.8, 20.4, 10.1, 12.4, 10.2, 7.1),
    "search_r1": (48.3, 42.3, 19.9, 13.4, 12.9, 10.2),
    "vrag_rl": (69.3, 43.1, 26.1, 26.3, 24.8, 21.2),
}
"""Table 1, 7B: SlideVQA single-hop and multi-hop, MMLongBench-Doc text, table, chart, layout: the columns whose kind
MiniDocs has. Their questions and documents are others."""

SCORE_OVERALL = {
    "vanilla_rag_1": (26.10, 32.88),
    "react": (31.11, 33.85),
    "search_r1": (46.76, 44.77),
    "vrag_rl": (62.59, 66.78),
}
"""SCORE's re-run, 7B: SlideVQA, ViDoSeek."""

SCORE_BEHAVIOUR = {"gold_recall": 76.8, "pages": 1.78, "noise_pages": 0.77, "accuracy": 62.59, "turns": 4.36,
                   "tokens_sampled": 2932, "seconds": 5.23}  # fmt: skip
"""SCORE on VRAG-RL-7B: evidence completeness (%), pages and noise pages retrieved, accuracy on SlideVQA; turns, tokens
and latency (s) on the hardware and in the units of that paper."""

PAPER_TABLE_2 = {"search_answer_only": 47.2, "vrag_answer_only": 49.3, "sft_rl_search": 54.9, "vrag_rl": 57.1}
"""Table 2 (7B): reward (outcome only, RAG-specific) x actions (search, search and perception). Rows by tick marks."""

PAPER_TABLE_3 = {"sft": (9.4, 84.2), "vrag_rl": (5.1, 97.1)}
"""Table 3: invalid action rate and finish rate, %, of SFT and of SFT and RL."""

PAPER_FIGURE_3 = {1: 34.7, 2: 42.4, 3: 50.1, 4: 54.1, 5: 56.4, 6: 55.3}
"""Figure 3: accuracy by number of reference images in context, read off the picture, order inferred."""

PAPER_FIGURE_3_BOUND = 63.5
"""Figure 3: the horizontal line."""


@dataclass(frozen=True)
class Effect:
    """How much higher `column` is in cell `a` than in cell `b`, and what others found.

    column: one of `paper_columns.COLUMNS`. paper: points in the paper (percent, 7B), None where not printed; sign: +1
    or -1 of what the paper claims, 0 where it claims nothing. score: the re-run's points on SlideVQA and ViDoSeek.
    element: only questions whose answer stands in it. note: what a reader has to know of the comparison. by_design:
    whether the benchmark or the agents are made such that the sign could hardly be another one; the note says how.
    """

    name: str
    a: str
    b: str
    source: str
    paper: float | None = None
    sign: int = 0
    column: str = "accuracy"
    score: tuple[float, ...] = ()
    element: str = ""
    note: str = ""
    by_design: bool = False

    @property
    def claimed(self) -> int:
        """+1, -1 or 0: the direction that the paper claims."""
        return self.sign or (0 if self.paper is None else (self.paper > 0) - (self.paper < 0))


_READ_OFF = "read off the picture"
_SEEN = "wanted after the numbers had been seen"
_FORMAT_ONLY = "here ReAct is a policy that was taught the format alone"
_UNREAD = "this policy hardly reads pages quoted as text, and the stage `format` shows none"
_WORDS = "MiniDocs' questions avoid the words of their pages, and its scripted experts search with them"
_CONFOUND = "the paper compares a model with SFT and crop with one that has neither"

EFFECTS = (
    Effect("VRAG-RL over Search-R1-VL", "vrag_rl", "search_r1", "Table 1", 19.7, score=(15.83, 22.01), note=_CONFOUND),
    Effect("Search-R1-VL over ReAct", "search_r1", "react", "Table 1", 10.5, score=(15.65, 10.92)),
    Effect(
        "ReAct over Vanilla RAG", "react", "vanilla_rag_1", "Table 1", 2.7, score=(5.01, 0.97),
        note="-2.3 in the paper's 3B; how many pages its Vanilla RAG is given is not said",
    ),
    *(
        Effect(f"images over text, {agent}", cell, f"{cell}_text", "Table 1", points, note=_UNREAD, by_design=True)
        for agent, cell, points in (
            ("Vanilla RAG", "vanilla_rag_5", 3.3),
            ("ReAct", "react", 11.1),
            ("Search-R1", "search_r1", 15.2),
        )
    ),
    Effect("SFT before RL, without crop", "sft_rl_search", "search_r1", "Table 2 - Table 1", 17.5,
           note="54.9 of Table 2 less 37.4 of Table 1: the confound's first half"),
    Effect("reward with nDCG, without crop", "sft_rl_search", "search_answer_only", "Table 2", 7.7),
    Effect("reward with nDCG, with crop", "vrag_rl", "vrag_answer_only", "Table 2", 7.8),
    Effect("crop, answer reward", "vrag_answer_only", "search_answer_only", "Table 2", 2.1),
    Effect("crop, VRAG-RL's reward", "vrag_rl", "sft_rl_search", "Table 2", 2.2, note="the confound's second half"),
    Effect("RL after SFT: invalid actions", "vrag_rl", "sft", "Table 3", -4.3, column="wrong_action_rate",
           note="answers before any search and wrong crops as well, as in the paper; which crops are wrong it does not "
                "say, here those that show at most half of each gold region"),
    Effect("RL after SFT: finished", "vrag_rl", "sft", "Table 3", 12.9, column="finish_rate"),
    Effect("5 pages over 1 in context", "vanilla_rag_5", "vanilla_rag_1", "Figure 3", 21.7, note=_READ_OFF),
    Effect("6 pages over 5 in context", "vanilla_rag_6", "vanilla_rag_5", "Figure 3", -1.1, note=_READ_OFF),
    Effect("gold pages over 5 found", "gold_pages", "vanilla_rag_5", "Figure 3", 7.1, by_design=True,
           note=f"{_READ_OFF}; the agent given gold pages learnt from about seven times as many trajectories"),
    Effect("first page found: learnt query over question", "vrag_rl", "vanilla_rag_1", "Figure 4", sign=1,
           column="first_gold", note=_WORDS, by_design=True),
    Effect("first page found: learnt query over ReAct", "vrag_rl", "react", "Figure 4", sign=1, column="first_gold",
           note=f"{_FORMAT_ONLY}; {_WORDS}", by_design=True),
    *(
        Effect(f"crop, {element} questions", "vrag_rl", "sft_rl_search", "Figure 5", sign=1, element=element)
        for element in ("text", "table", "chart", "layout")
    ),
    Effect("latency: VRAG-RL over Vanilla RAG", "vrag_rl", "vanilla_rag_1", "Figure 6", sign=1, column="seconds",
           note="more replies take longer; seconds depend on what else the machine did", by_design=True),
    Effect("searches: ReAct over VRAG-RL", "react", "vrag_rl", "Figure 6", sign=1, column="searches",
           note=_FORMAT_ONLY),
)  # fmt: skip
"""What the paper claims, or what follows from its tables. One family for the correction of p-values."""

ABLATIONS = (
    Effect("SFT alone", "sft", "vrag_rl", "not published", note="SCORE's own model: 75.62 before RL, 77.16 after"),
    *(
        Effect(f"crop, SFT alone{of}", "sft", "sft_search", "not published", element=element, note=_SEEN)
        for of, element in (("", ""), (", text questions", "text"))
    ),
    Effect("crop without SFT", "cold_start", "search_r1", "not published"),
    Effect("no SFT", "cold_start", "vrag_rl", "not published"),
    Effect("no SFT, the paper's settings for it", "cold_start_paper", "cold_start", "not published"),
    Effect("reward: nDCG alone", "retrieval_only", "vrag_rl", "not published"),
    *(
        Effect(f"{what}: nDCG", a, b, "not published", column="ndcg", note=note)
        for what, a, b, note in (
            ("RL after SFT", "vrag_rl", "sft", ""),
            ("reward: answer alone", "vrag_answer_only", "vrag_rl", _SEEN),
            ("reward: nDCG alone", "retrieval_only", "vrag_rl", ""),
        )
    ),
    Effect(
        "RL after SFT: invalid replies",
        "vrag_rl",
        "sft",
        "not published",
        column="invalid_rate",
        note="the paper's invalid actions are more, see there",
    ),
    Effect("reward: released code's", "released_code", "vrag_rl", "not published"),
    Effect("reward: released code's gate", "released_code", "no_gate", "not published"),
    Effect("no crop, VRAG-RL's SFT", "no_crop_same_sft", "vrag_rl", "not published"),
    Effect("groups of 2 instead of 5", "group_2", "vrag_rl", "not published"),
    Effect("groups of 10 instead of 5", "group_10", "vrag_rl", "not published"),
    Effect("no KL", "no_kl", "vrag_rl", "not published"),
    *(
        Effect(f"RL without SFT, {agent}: {what}", a, b, "not published", column=column, note=_SEEN)
        for agent, a, b in (("no crop", "search_r1", "react"), ("crop", "cold_start", "vrag_prompted"))
        for what, column in (("invalid actions", "invalid_rate"), ("finished", "finish_rate"))
    ),
    *(
        Effect(f"invalid replies penalised: {what}", "invalid_penalised", "vrag_rl", "not published", column=column)
        for what, column in (("answers", "accuracy"), ("invalid actions", "invalid_rate"), ("finished", "finish_rate"))
    ),
    Effect("crops padded by 8 pixels", "padding_8", "vrag_rl", "not published"),
    Effect("at most 3 replies instead of 5", "horizon_3", "vrag_rl", "not published"),
    Effect("at most 8 replies instead of 5", "horizon_8", "vrag_rl", "not published"),
    Effect("SFT on 300 trajectories", "sft_300", "sft", "not published"),
    Effect("SFT on 1,000 trajectories", "sft_1000", "sft", "not published"),
    Effect("SFT on 300 trajectories, then RL", "rl_300", "vrag_rl", "not published"),
    Effect("SFT on 1,000 trajectories, then RL", "rl_1000", "vrag_rl", "not published"),
    *(
        Effect(f"RL after SFT on 1,000 trajectories: {what}", "rl_1000", "sft_1000", "not published", column=column)
        for what, column in (
            ("answers", "accuracy"),
            ("invalid actions", "invalid_rate"),
            ("finished", "finish_rate"),
            ("nDCG", "ndcg"),
        )
    ),
)
"""What nobody published: the change, of accuracy unless named, against the cell that the ablation starts from. A family
of its own."""
