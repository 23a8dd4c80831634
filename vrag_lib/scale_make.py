"""Make the scale policy from nothing: train, measure, and say on its card what it can and cannot do."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vrag_lib.minidocs import MiniDocs
from vrag_lib.provenance import provenance
from vrag_lib.rendering import write_atomically
from vrag_lib.scale_evaluate import evaluate_policy, write_evaluation
from vrag_lib.scale_loop import in_processes
from vrag_lib.scale_policy import MAX_PIXELS
from vrag_lib.scale_training import PolicyTraining, train_policy

TARGETS = {("crop", "all"): 0.95, ("region", "all"): 0.85, ("title", "all"): 0.90}
"""What a policy that perceives well enough for the experiment reaches on unseen documents."""

CEILING = {("page", "table and chart"): 0.50}
"""What it must not exceed, or looking closer would not pay."""

_HELD_OUT = "validation "
"""How the columns of a curve begin that were measured on pages never trained on."""

_PANELS = {
    "loss": r"loss",
    "losses of heads": r"gaze_loss_.*",
    "losses of names and places": r"(naming|place)_loss",
    "value from the crop of its region": r"crop .*",
    "value from a crop of several regions": r"several .*",
    "value from the whole page": r"page .*",
    "boxes: region exact, overlap IoU ≥ 0.5": r"region|overlap",
    "titles, names, items, lines of text": r"title|name|items|line|text",
    "words of a question": r"about|column|copy|measure",
    "value from a later image": r"later .*",
    "value in a sentence": r"told .*",
    "value from a page quoted as text": r"quoted .*",
    "heads that look words up": r"naming_gaze_.*|found_.*",
    "heads of layers 0 and 1 that look right": r"gaze_[01]\..*",
    "heads of layers 2 and 3 that look right": r"gaze_[23]\..*",
    "cells: characters told": r"(.* )?characters",
    "cells: digits told": r"(.* )?digits",
    "cells: words told and found": r"(.* )?words|found",
    "cells: places and boxes told": r"neighbours|positions|boxes",
    "pairs told apart": r".*_finds_.*",
}
"""Panels of a training curve's figure: title and what the names of its columns look like. Few lines each."""

_NAMES = {
    "crop": "value from the crop of its region",
    "region": "region named by the question, IoU ≥ 0.5",
    "title": "title of the page",
    "page": "value from the whole page",
}


def make_policy(
    out: Path,
    results: Path,
    work: Path,
    recipe: PolicyTraining | None = None,
    test_documents: int = 80,
    note: str = "",
    device: str = "cpu",
    workers: int = 0,
    processes: int = 1,
) -> list[dict[str, Any]]:
    """Train the policy, measure it on the test split and write its card: what `vrag scale-model` does for it.

    out: checkpoint folder. results: curves and evaluation. work: training checkpoints, from which the same call goes
    on after a kill. `workers` processes make the data for `device`; on the processor several `processes` may train
    together, which is as if every step were so many times as wide. Returns the rows of the evaluation.
    """
    recipe = recipe or PolicyTraining()
    in_processes(processes, train_policy, recipe, work, results, out, device, workers)
    docs = MiniDocs(recipe.minidocs)
    rows = write_evaluation(evaluate_policy(out, "test", test_documents, docs=docs), results)
    draw_curves(results)
    write_card(out, recipe, rows, stage_seconds(results, recipe.stages), note)
    return rows


def draw_curves(folder: Path) -> list[Path]:
    """Beside every training curve (CSV with a `step` and a `loss`) of a folder its figure: loss and rates, panel by
    panel, of the training steps solid and on held-out pages dashed."""
    import pandas as pd

    from vrag_lib.plots import curves_figure, save_figure

    drawn = []
    for path in sorted(folder.glob("*.csv")):
        table = pd.read_csv(path)
        if not {"step", "loss"} <= set(table.columns):
            continue
        table = table.rename(columns=_one_name)
        names = dict.fromkeys(name.removeprefix(_HELD_OUT) for name in table.columns)
        panels = {title: [name for name in names if re.fullmatch(form, name)] for title, form in _PANELS.items()}
        panels = {title: sorted(chosen) for title, chosen in panels.items() if chosen}
        across = -(-len(panels) // -(-len(panels) // 4))  # rows of 4 at most, equally long
        figure = curves_figure(table, panels, width=3.6 * across, across=across, twin=_HELD_OUT)
        if any(name.startswith(_HELD_OUT) for name in table.columns):
            figure.suptitle("solid: on the training steps; dashed, or a dot: on held-out pages", fontsize=9)
        drawn.append(save_figure(figure, path.with_suffix(".png")))
    return drawn


def _one_name(column: str) -> str:
    """Columns of held-out text by em, as they have been called, under the name that all held-out ones begin with.

    >>> _one_name("chars_em10-13_digits"), _one_name("held out em 10-13 digits"), _one_name("loss")
    ('validation em 10-13 digits', 'validation em 10-13 digits', 'loss')
    """
    match = re.fullmatch(r"(?:chars_em|held out em )(\d+-\d+)[ _](\w+)", column)
    return f"{_HELD_OUT}em {match[1]} {match[2]}" if match else column


def stage_seconds(results: Path, stages: Sequence[str]) -> dict[str, int]:
    """Seconds of each stage, by the last row of its curve."""
    seconds = {}
    for stage in stages:
        with (results / f"curve_{stage}.csv").open(newline="") as file:
            seconds[stage] = int(list(csv.DictReader(file))[-1]["seconds"])
    return seconds


def write_card(
    out: Path, recipe: PolicyTraining, rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float], note: str = ""
) -> Path:
    """Write `README.md` and `training.json` beside the weights. `rows` are those of `scale_evaluate.summary`,
    `seconds` the time each stage ran, `note` anything a reader must know about this very run."""
    about = {"recipe": asdict(recipe), "seconds": dict(seconds), "evaluation": list(rows), **provenance(recipe.seed)}
    write_atomically(out / "training.json", (json.dumps(about, indent=1) + "\n").encode())
    lines = ["| question | on | n | right | 95 % interval | target |", "|---|---|---|---|---|---|"]
    for row in rows:
        key = (row["task"], row["element"])
        target = f"≥ {TARGETS[key]:.0%}" if key in TARGETS else f"≤ {CEILING[key]:.0%}" if key in CEILING else ""
        lines.append(
            f"| {_NAMES[row['task']]} | {row['element']} | {row['n']} | {row['right']:.1%} "
            f"| {row['low']:.1%} to {row['high']:.1%} | {target} |"
        )
    stages = ", ".join(f"{name} {getattr(recipe, name).steps} steps in {s / 60:.0f} min" for name, s in seconds.items())
    own = {"preset": "laptop", "settings": "", "more": "", "collection": ""}
    if recipe.name == "policy_legible":
        settings = " --preset laptop_legible"
        own = {"preset": "laptop_legible", "settings": settings, "more": _MORE, "collection": _LARGE_PRINT}
    text = _CARD.format(
        tokens=MAX_PIXELS // 784, table="\n".join(lines), stages=stages, seed=recipe.seed, note=note, name=recipe.name,
        **own,
    )  # fmt: skip
    write_atomically(out / "README.md", text.encode())
    return out / "README.md"


_LARGE_PRINT = "\nPages of text are set large enough to be read whole (`minidocs.text_px`)."
_MORE = """ In the end the tower is
sharpened on much more print, and everything is trained together once more, pages quoted as text among it."""

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The scale policy

A Qwen2.5-VL of 3.7 M parameters (`Qwen2_5_VLForConditionalGeneration`: 4 vision blocks of width 128, 4
language layers of width 192) that was taught to perceive MiniDocs pages: titles, text, places and values. It
is the start of the preset {preset}, as Qwen2.5-VL-7B-Instruct is the start of the paper. It knows nothing of
searching, cropping or answering in tags; its tokenizer has the tags.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("data/scale_{name}", dtype="float32")
processor = AutoProcessor.from_pretrained("data/scale_{name}")
```

Images are shown at {tokens} vision tokens of 28 x 28 pixels, pages and crops alike. Stored in float16.

## What it can do
MiniDocs test split: documents, entities, layout families and palettes that training never drew.{collection} Exact match
of greedy replies to the benchmark's single-hop questions, one image and one question at a time; intervals by
bootstrap over questions.

{table}

Every answer is in `results/{preset}/scale_model/{name}/perception_probes.csv`.

## How it was made
`vrag scale-model policy{settings}`, seed {seed}, from random weights, on generated images alone (no photographs, no
scraped text, no other model): {stages}. First the vision tower learns to tell, cell by cell, the characters of
pages of random text and the characters and words of MiniDocs training pages, with the boxes of what those words name;
then the language model learns to read through the fixed tower, some of its heads shown where to look; then everything
is trained together; then the language model learns to write words of a question again, as others can, and to do
all of this in conversations about several texts and images.{more}
Curves are in `results/{preset}/scale_model/{name}/`, settings and versions in `training.json`.
{note}
## Limits
English words of MiniDocs and numbers only; Latin characters in DejaVu faces; no photographs. Not for any use
outside this scale model. Weights and data: Apache-2.0; the DejaVu fonts have their own free licence.
"""
