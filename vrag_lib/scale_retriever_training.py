"""Train the scale retriever from nothing: first to read words, then to find pages (`vrag scale-model`).

Deviations from ColQwen2's training, which adapts a model that reads: (1) a reading stage on dense random text comes
first, with each cell's words and characters as targets; (2) beside the contrastive loss on whole queries, single
query words are aligned with the very cells that show them, which the drawing code knows. The contrastive loss is
ColPali's: cross-entropy of late-interaction scores over the pages of the batch, hard negatives among them.

    train_retriever("data/scale_retriever_colqwen2", hours=1.0, seed=0)

Weights depend on the seed, the hours (which set the number of steps), the versions and the number of threads. A
killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vrag_lib.minidocs_documents import MiniDocsConfig
from vrag_lib.scale_characters import CHARACTERS
from vrag_lib.scale_loop import Schedule, train
from vrag_lib.scale_retriever import (
    build_processor,
    build_retriever,
    embed_pages,
    embed_queries,
    encode_cells,
    page_prompt,
    query_ids,
    save_retriever,
)
from vrag_lib.scale_retriever_pages import BINS, LabelledPage, PagePool, Vocabulary, word_page
from vrag_lib.torch_setup import keep_freed_memory

WINDOWS = ((4, 12), (6, 8), (8, 6))
"""Shapes of the windows of a reading step in cells (rows, columns), one after the other."""

WHOLE_PAGES_EVERY = 8
"""Every eighth reading step reads whole pages, so that the tower meets their size."""

CELLS_PER_STEP = 480
"""Cells of one reading step; small steps at a high rate learn more per second than large ones."""

RANDOM_TEXT = (8, 12)
"""Cells of a page of random text, of which windows are read."""

FRESH, REPLAYED = 2, 600
"""New pages of random text per reading step, and how many earlier ones are read again."""

GROUPS = 6
"""Triples of pages per step of the second stage; three pages each."""

STEPS_PER_HOUR = (7000, 1500)
"""Steps of the two stages for each hour of training on one quiet core; the second has the tower's features cached."""

ALIGNMENT_SCALE = 12.0
"""Inverse temperature of the alignment of single words with cells."""

SCORE_SCALE = 4.0
"""Inverse temperature of the contrastive loss on late-interaction scores."""


class Trainer:
    """A retriever in training: the model, its reading head and everything that losses need."""

    def __init__(self, seed: int):
        import torch

        keep_freed_memory()
        self.seed = seed
        self.random_text = functools.lru_cache(REPLAYED + 10 * FRESH)(self._random_text)
        self.processor = build_processor()
        self.vocabulary = Vocabulary(self.processor.tokenizer)
        self.model = build_retriever(self.processor.tokenizer, seed)
        self.prompt = page_prompt(self.processor)
        self.pad = self.processor.tokenizer.pad_token_id
        torch.manual_seed(seed)
        width = self.model.config.vision_config.hidden_size
        self.head = torch.nn.Linear(width, BINS[0] * BINS[1] * (len(CHARACTERS) + 1))

    @property
    def modules(self) -> dict[str, Any]:
        return {"model": self.model, "head": self.head}

    def features(self, pages: Sequence[LabelledPage]) -> Any:
        """The tower's features (pages, cells, width) of pages of one shape."""
        import torch

        patches = torch.from_numpy(np.stack([page.patches for page in pages])).float() / 127.5 - 1
        return encode_cells(self.model.visual, patches, *pages[0].grid)

    def embed(self, pages: Sequence[LabelledPage], features: Sequence[Any] | None = None) -> tuple[Any, Any]:
        """Token embeddings (pages, tokens, 128) and tower features (pages, cells, width), in the order given.

        All pages must have equally many cells; those of one shape go through the model together. `features`: those
        of the pages where they are known.
        """
        import torch

        order: list[int] = []
        embedded, encoded = [], []
        for grid in sorted({page.grid for page in pages}):
            chosen = [i for i, page in enumerate(pages) if page.grid == grid]
            order += chosen
            if features:
                known = torch.stack([features[i] for i in chosen])
            else:
                known = self.features([pages[i] for i in chosen])
            encoded.append(known)
            embedded.append(embed_pages(self.model, self.prompt, known, *grid))
        back = torch.tensor(order).argsort()
        return torch.cat(embedded)[back], torch.cat(encoded)[back]

    def cells(self, embeddings: Any, pages: Sequence[LabelledPage]) -> Any:
        """Of token embeddings (pages, tokens, 128) those of cells."""
        start = len(self.prompt[0])
        return embeddings[:, start : start + pages[0].grid[0] * pages[0].grid[1]]

    def reading_loss(self, features: Any, pages: Sequence[LabelledPage]) -> tuple[Any, dict[str, tuple[float, float]]]:
        """Cross-entropy of the character that covers each eighth of each cell, from the tower's features."""
        import torch
        from torch.nn import functional as F

        logits = self.head(features.flatten(0, 1)).view(-1, BINS[0] * BINS[1], len(CHARACTERS) + 1)
        target = torch.from_numpy(np.concatenate([page.characters for page in pages])).long()
        covered = target > 0
        weight = torch.where(covered, 1.0, 0.1)
        losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        right = ((logits.argmax(-1) == target) & covered).sum()
        return (losses * weight).sum() / weight.sum(), {"characters": (float(right), float(covered.sum()))}

    def word_queries(self, rng: random.Random, classes: Sequence[int]) -> tuple[Any, Any]:
        """Query embeddings (classes, 128) of single words, read in rows of about eight in random order; a second
        syllable follows a first one, as in a name."""
        import torch

        rows: list[list[int]] = [[]]
        places: list[tuple[int, int]] = []
        order = list(range(len(classes)))
        rng.shuffle(order)
        for k in order:
            token = self.vocabulary.ids[classes[k]]
            if len(rows[-1]) >= 8:
                rows.append([])
            if token in self.vocabulary.ends:
                rows[-1].append(rng.choice(self.vocabulary.starts))
            rows[-1].append(token)
            places.append((len(rows) - 1, len(rows[-1])))
        embeddings, mask = embed_queries(self.model, rows, self.pad)
        longest = mask.shape[1]
        found = torch.stack([embeddings[row, longest - len(rows[row]) + end - 1] for row, end in places])
        return found[torch.tensor(order).argsort()], mask

    def alignment_loss(
        self, rng: random.Random, cells: Any, pages: Sequence[LabelledPage]
    ) -> tuple[Any, dict[str, tuple[float, float]]]:
        """Words against cells, both ways: of all cells of the batch those that show a word, and of all words asked
        those that a cell shows. Cells with a small part of a word count neither way."""
        import torch
        from torch.nn import functional as F

        shown = sorted({int(word) for page in pages for word in page.words})
        absent = sorted(set(range(self.vocabulary.classes)) - set(shown))
        classes = shown + rng.sample(absent, min(48, len(absent)))
        row = {word: i for i, word in enumerate(classes)}
        count, length = cells.shape[:2]
        near = np.zeros((2, len(classes), count, length), bool)  # cells that show a word, and that show any of it
        for p, page in enumerate(pages):
            for word, share in zip(page.words, page.near, strict=True):
                near[0, row[int(word)], p] |= share >= 0.6 * share.max()
                near[1, row[int(word)], p] |= share > 0.15 * share.max()
        positive, negative = torch.from_numpy(near[0]), torch.from_numpy(~near[1])
        queries, _ = self.word_queries(rng, classes)
        scores = torch.einsum("vd,pcd->vpc", queries, cells) * ALIGNMENT_SCALE
        low = torch.finfo(scores.dtype).min
        # word -> cells: the cells of one page that show it, against all cells that do not
        against = scores.masked_fill(~negative, low).flatten(1).logsumexp(1)
        for_it = scores.masked_fill(~positive, low).logsumexp(2)  # (words, pages)
        on_page = positive.any(2)
        to_cells = F.softplus(against[:, None] - for_it)[on_page].mean()
        # cell -> words
        against = scores.masked_fill(~negative, low).logsumexp(0)
        to_words = F.softplus(against[None] - scores)[positive].mean()
        with torch.no_grad():
            best = scores.masked_fill(~positive, low).amax(2)
            found = (best > scores.masked_fill(~negative, low).flatten(1).amax(1)[:, None])[on_page]
            named = (scores > scores.masked_fill(~negative, low).amax(0)[None])[positive]
        counts = {
            "word_finds_cell": (float(found.sum()), float(found.numel())),
            "cell_finds_word": (float(named.sum()), float(named.numel())),
        }
        return to_cells + to_words, counts

    def contrastive_loss(self, queries: Sequence[str], pages: Any) -> tuple[Any, dict[str, tuple[float, float]]]:
        """Late-interaction scores of each query with every page of the batch; the i-th page is the i-th query's."""
        import torch

        embeddings, mask = embed_queries(self.model, query_ids(self.processor, queries), self.pad)
        best = torch.einsum("qld,ptd->qplt", embeddings, pages).amax(-1)
        scores = (best * mask[:, None]).sum(-1)  # (queries, pages)
        target = torch.arange(len(queries))
        loss = torch.nn.functional.cross_entropy(scores * SCORE_SCALE, target)
        return loss, {"query_finds_page": (float((scores.argmax(1) == target).sum()), float(len(queries)))}

    def _random_text(self, index: int) -> LabelledPage:
        rng = random.Random(f"{self.seed}/random text/{index}")
        return word_page(rng, RANDOM_TEXT, self.vocabulary)

    def page_features(self, pool: PagePool) -> dict[tuple[int, int], Any]:
        """The tower's features of every page of the pool."""
        import torch

        with torch.no_grad():
            return {
                place: self.features([pool.page(place)[1]])[0]
                for place in tqdm(pool.all_places, "features of pages", unit="page")
            }

    def reading_pages(self, pool: PagePool, number: int) -> list[LabelledPage]:
        """What a reading step reads: half of it random text, half windows of documents' pages; or whole pages."""
        rng = random.Random(f"{self.seed}/retriever reading/{number}")
        if number % WHOLE_PAGES_EVERY == WHOLE_PAGES_EVERY - 1:
            places = [rng.choice(pool.all_places) for _ in range(2)]
            return [pool.page(place)[1] for place in places]
        grid = WINDOWS[number % len(WINDOWS)]
        count = CELLS_PER_STEP // (grid[0] * grid[1]) // 2
        newest = FRESH * number
        chosen = [newest + i for i in range(FRESH)]
        chosen += [rng.randrange(max(0, newest - REPLAYED), newest + FRESH) for _ in range(count - FRESH)]
        pages = []
        for index in chosen:
            page = self.random_text(index)
            row, column = (rng.randint(0, whole - size) for size, whole in zip(grid, page.grid, strict=True))
            pages.append(page.window(row, column, grid))
        for _ in range(count):
            page = pool.page(rng.choice(pool.all_places))[1]
            cell = divmod(int(rng.choice(page.near).argmax()), page.grid[1])  # a window about some word
            row, column = (
                min(max(0, at - rng.randrange(size)), whole - size)
                for at, size, whole in zip(cell, grid, page.grid, strict=True)
            )
            pages.append(page.window(row, column, grid))
        return pages

    def reading_step(self, pool: PagePool, number: int) -> tuple[Any, dict[str, tuple[float, float]]]:
        """One step of the first stage."""
        rng = random.Random(f"{self.seed}/retriever words/{number}")
        pages = self.reading_pages(pool, number)
        embeddings, features = self.embed(pages)
        reading, counts = self.reading_loss(features, pages)
        alignment, more = self.alignment_loss(rng, self.cells(embeddings, pages), pages)
        return reading + 0.5 * alignment, {**counts, **more}

    def finding_step(self, pool: PagePool, features: dict[Any, Any], number: int) -> Any:
        """One step of the second stage; `features` holds the tower's features (cells, width) of every page."""
        rng = random.Random(f"{self.seed}/retriever finding/{number}")
        places = pool.batch(rng, GROUPS)
        pages = [pool.page(place)[1] for place in places]
        embeddings, _ = self.embed(pages, [features[place] for place in places])
        contrast, counts = self.contrastive_loss(pool.queries(rng, places), embeddings)
        alignment, more = self.alignment_loss(rng, self.cells(embeddings, pages), pages)
        return contrast + 0.3 * alignment, {**counts, **more}


def schedules(hours: float) -> tuple[Schedule, Schedule]:
    """Lengths and rates of the two stages for a training of `hours` on one core."""
    first, second = (max(2, round(hours * steps)) for steps in STEPS_PER_HOUR)
    return (
        Schedule(first, muon=4e-3, adamw=3e-3, warmup=min(50, first), decay=0.35, log_every=50, save_every=200),
        Schedule(second, muon=0, adamw=1e-3, warmup=min(50, second), decay=0.7, log_every=25, save_every=100),
    )


def train_retriever(
    out_dir: str | Path,
    hours: float = 1.0,
    seed: int = 0,
    resume: bool = True,
    work_dir: str | Path | None = None,
    curves_dir: str | Path | None = None,
    documents: int | None = None,
) -> Path:
    """Train the scale retriever from nothing and save it to `out_dir`, whose path must contain `colqwen2`.

    hours: length of the training on one quiet core; sets the number of steps, so that the result does not depend on
    the machine's speed. resume: go on from this seed's and length's checkpoints in `work_dir` (default
    `{out_dir}-training`), else start anew. curves_dir: where `reading.csv` and `finding.csv` go (default: beside the
    checkpoints). documents: training documents to learn from (default: all of the split).
    """
    work = Path(work_dir or f"{out_dir}-training") / f"seed-{seed}-hours-{hours:g}"
    if not resume:
        for stage in ("reading", "finding"):
            shutil.rmtree(work / stage, ignore_errors=True)
    curves = Path(curves_dir or work)
    trainer = Trainer(seed)
    pool = PagePool(MiniDocsConfig(seed=seed), trainer.vocabulary, documents)
    reading, finding = schedules(hours)
    train(
        "reading", trainer.modules, int, lambda n: trainer.reading_step(pool, n), reading, work, curves / "reading.csv"
    )
    trainer.model.visual.requires_grad_(False)
    features = functools.cache(lambda: trainer.page_features(pool))  # not needed when the stage was finished before
    modules = {"model": trainer.model}
    train(
        "finding", modules, int, lambda n: trainer.finding_step(pool, features(), n), finding, work,
        curves / "finding.csv",
    )  # fmt: skip
    trainer.model.requires_grad_(True).eval()
    return save_retriever(trainer.model, trainer.processor, out_dir)
