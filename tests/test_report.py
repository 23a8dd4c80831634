"""The report from hand-made rows: what is written, what it says, and that figures need nothing but the CSV files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from paper_rows import made_up, store
from PIL import Image

from vrag_lib.cli import main
from vrag_lib.matrix import MatrixError, cell_folder
from vrag_lib.matrix_cells import CELLS
from vrag_lib.paper_figures import FIGURES, draw_figures
from vrag_lib.paper_tables import make_tables
from vrag_lib.presets import load_config
from vrag_lib.report import TEXTS, as_markdown, collapse, gold, legibility, verdicts, write_report


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    config = load_config("laptop", [f"results={results}"], experiment=True)
    store(made_up(24, 2, cells=tuple(name for name in CELLS if name != "horizon_8")), config)
    folder = cell_folder(config, "horizon_8", 0)
    folder.mkdir(parents=True)
    (folder / "error.txt").write_text("Traceback\nValueError: too long a name\n")
    return config, write_report(config, seeds=2)


def test_a_table_as_text_or_the_command_that_measures_it():
    known, nothing = make_tables(made_up(24, 2)), make_tables(made_up(24, 2, cells=("gold_pages_crop",)))
    for name, (_, cells) in TEXTS.items():
        assert "| --- |" in as_markdown(name, known) and "not measured" not in as_markdown(name, known).lower()
        assert set(cells) <= set(CELLS)
        if "gold_pages_crop" not in cells:
            assert as_markdown(name, nothing).endswith(f"`vrag reproduce-paper --cells {' '.join(cells)}` does it.")


def test_nothing_is_said_of_what_was_not_run():
    nothing = make_tables({})
    assert gold(nothing) == legibility(nothing) == collapse(nothing) == ""
    assert verdicts(nothing["effects"]).startswith("- **not measured** (24 of 24)")


def test_the_page_says_what_agrees_and_what_is_missing(written):
    config, page = written
    text = page.read_text()
    effects = pd.read_csv(config.folder("paper") / "effects.csv")
    assert page.name == "REPORT.md" and f"**not resolved** ({(effects['verdict'] == 'not resolved').sum()} of" in text
    for row in effects.itertuples():
        either = {f"{row.difference + tiny:+.1f}" for tiny in (-1e-9, 1e-9)}  # half a digit may be rounded either way
        assert any(number in text for number in either) or row.column in ("seconds", "searches"), row.effect
    assert "`horizon_8` seed 0: ValueError: too long a name" in text
    assert "Not finished with every seed: `horizon_8`" in text and "at most 8 replies instead of 5" in text
    count = sum(len(CELLS[name].seeds(2)) for name in CELLS)
    assert f"{count - 2} of {count} cells × seeds are finished, on 24 answerable" in text
    assert "Holm" in text and "| +19.7 | +15.8 / +22.0 | Table 1 |" in text and str(config.results) not in text
    assert "nan" not in text.replace("finance", "")


def test_the_page_says_where_whole_pages_cannot_be_read(tmp_path):
    config, mixed, other = (load_config("laptop", [f"results={tmp_path}/{n}"], experiment=True) for n in (1, 2, 3))
    rows = made_up(400, 1, cells=("react", "vanilla_rag_1", "gold_pages", "gold_regions", "vrag_rl", "sft_rl_search"))
    legible = rows["gold_pages"].assign(judge=1.0)
    store(rows | {"gold_pages": legible}, config)
    assert "not legible whole" not in write_report(config, seeds=1).read_text()
    charts = legible.assign(judge=(legible["source_type"] != "Chart").astype(float))
    store(rows | {"gold_pages": charts}, mixed)
    assert "**Pages of chart questions are not legible whole" in write_report(mixed, seeds=1).read_text()
    store(rows | {"gold_pages": rows["gold_pages"].assign(judge=0.0)}, other)
    text = write_report(other, seeds=1).read_text()
    assert "Given the gold pages the policy answers 0.0 [0.0, 0.9] %" in text
    assert "show nothing, either way: ReAct over Vanilla RAG." in text
    assert "the sign is built in: crop, VRAG-RL's reward; crop, text questions;" in text


def test_the_page_says_which_agree_by_construction_and_which_agents_say_one_thing(tmp_path):
    rows = made_up(80, 1, cells=("react", "search_r1", "gold_pages", "gold_pages_crop", "gold_regions", "vrag_rl"))
    for name in ("react", "search_r1", "gold_pages", "gold_pages_crop"):
        rows[name] = rows[name].assign(judge=0.0)
    rows["vrag_rl"] = rows["vrag_rl"].assign(judge=1.0, crop_iou=0.5)
    rows["gold_pages_crop"] = rows["gold_pages_crop"].assign(crop_iou=0.25)
    rows["search_r1"] = rows["search_r1"].assign(answer="Not answerable")
    config = load_config("laptop", [f"results={tmp_path}"], experiment=True)
    store(rows, config)
    page = write_report(config, seeds=1).read_text()
    tables = (config.folder("paper") / "README.md").read_text()
    for text in (page, tables):
        assert "**agrees, but the sign is built in** (1 of 24): VRAG-RL over Search-R1-VL" in text
        assert "| agrees | built in |" in text and "Cells: `vrag_rl`: SFT, RL" in text
        share = 100 * rows["search_r1"]["answered"].mean()
        assert f"- `search_r1` ({CELLS['search_r1'].about}): `Not answerable` in {share:.1f} %" in text
        assert (
            "that is why `search_r1` came to say so was not tested" in text
            and "`react`:" not in text.partition("Collapsed")[2][:400]
        )
        assert "no skill, whatever their sign: RL without SFT, no crop: finished; RL without SFT, no crop: inv" in text
    assert "**In short**, % [95 %]:" in page and "| the best that cannot crop: " in page
    assert "no upper bound: `gold_pages` (0.0 [0.0, 4.5] %) and `gold_pages_crop` (0.0 [0.0, 4.5] %)" in tables
    assert "is 0.25 [0.25, 0.25], of those of `vrag_rl` 0.50 [0.50, 0.50]" in tables
    table = pd.read_csv(config.folder("paper") / "table_1.csv").set_index("cell")
    assert table.loc["search_r1", "top_answer"] == "Not answerable" and table.loc["react", "refused_share"] == 0


def test_a_model_cannot_break_a_table_by_what_it_answers(tmp_path):
    rows = made_up(8, 1, cells=("react",))
    rows["react"] = rows["react"].assign(answer="a`|\nb", answered=True)
    config = load_config("laptop", [f"results={tmp_path}"], experiment=True)
    store(rows, config)
    write_report(config, seeds=1)
    assert "| `a'\\| b` 100.0 |" in (config.folder("paper") / "README.md").read_text()


def test_all_tables_and_figures_are_there(written):
    config, page = written
    folder = config.folder("paper")
    assert {path.stem for path in folder.glob("*.png")} == set(FIGURES)
    text = (folder / "README.md").read_text()
    for name in FIGURES:
        assert f"![{name}]({name}.png)" in text and 400 < Image.open(folder / f"{name}.png").width < 1600
    for link in ("laptop/paper/effects.png", "laptop/paper/README.md"):
        assert link in page.read_text() and (page.parent / link).is_file()
    assert "| VRAG-RL-7B in SCORE | 4.36 |" in text and "no answer" in text and "Accuracy by training seed" in text


def test_figures_are_drawn_from_csv_alone(written, tmp_path):
    config, _ = written
    for path in config.folder("paper").glob("*.csv"):
        shutil.copy(path, tmp_path)
    assert {path.stem for path in draw_figures(tmp_path)} == set(FIGURES)
    (tmp_path / "table_2.csv").write_text("\n")
    assert "table_2" not in {path.stem for path in draw_figures(tmp_path)} and not (tmp_path / "table_2.png").exists()
    with pytest.raises(FileNotFoundError, match="--report-only"):
        draw_figures(tmp_path / "nowhere")


def test_a_matrix_with_one_cell_is_reported_too(tmp_path, capsys):
    config = load_config("gpu_3b", [f"results={tmp_path}"], experiment=True)
    with pytest.raises(MatrixError, match="no finished cell"):
        write_report(config)
    store(made_up(8, 1, cells=("react",)), config)
    assert main(["reproduce-paper", "--report-only", "--preset", "gpu_3b", f"results={tmp_path}"]) == 0
    assert "REPORT_gpu_3b.md" in capsys.readouterr().out
    assert "**not measured** (24 of 24)" in (tmp_path / "REPORT_gpu_3b.md").read_text()


def test_the_readmes_tables_of_agents_are_the_reports():
    """Rows `| what | `cell` | right [low, high] | finished | invalid replies | nDCG | crops | seeds |`."""
    root = Path(__file__).parent.parent
    cells = pd.read_csv(root / "results" / "laptop" / "paper" / "cells.csv").set_index("cell")
    columns = ("accuracy", "finish_rate", "invalid_rate", "ndcg")
    shown = 0
    for line in (root / "README.md").read_text().splitlines():
        parts = [part.strip(" *") for part in line.split("|")[1:-1]]
        if len(parts) != 8 or parts[1].strip("`") not in cells.index:
            continue
        row = cells.loc[parts[1].strip("`")]
        limits = [f"{row[c]:.1f} [{row[f'{c}_low']:.1f}, {row[f'{c}_high']:.1f}]" for c in columns]
        wanted = [*limits, f"{row['crops']:.2f}", str(row["seeds"])]
        assert all(part in ("", text) for part, text in zip(parts[2:], wanted, strict=True)), line
        shown += 1
    assert shown > 30
