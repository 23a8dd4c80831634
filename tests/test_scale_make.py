"""Training curves of the scale models: which panel a column is drawn in."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from vrag_lib.plots import COLOURS
from vrag_lib.scale_make import _PANELS, _one_name, draw_curves

CURVES = Path(__file__).parent.parent / "results" / "laptop" / "scale_model"


def test_every_column_of_the_kept_curves_has_one_panel_and_no_panel_has_more_lines_than_colours():
    for path in sorted(CURVES.rglob("*.csv")):
        columns = pd.read_csv(path, nrows=0).columns
        if not {"step", "loss"} <= set(columns):
            continue
        names = {_one_name(name).removeprefix("validation ") for name in columns} - {"step", "seconds", "cpu_seconds"}
        lines = {title: [name for name in names if re.fullmatch(form, name)] for title, form in _PANELS.items()}
        assert sorted(name for drawn in lines.values() for name in drawn) == sorted(names), path
        assert max(map(len, lines.values())) <= len(COLOURS), path


def test_figures_stand_beside_curves_and_other_tables_are_left_alone(tmp_path):
    curve = {"step": [1, 2], "loss": [2.0, 1.0], "crop text": [0.1, 0.2], "validation crop text": [None, 0.1]}
    pd.DataFrame(curve).to_csv(tmp_path / "curve_reading.csv", index=False)
    pd.DataFrame({"task": ["crop"], "right": [1]}).to_csv(tmp_path / "perception.csv", index=False)
    assert draw_curves(tmp_path) == [tmp_path / "curve_reading.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["curve_reading.png"]
