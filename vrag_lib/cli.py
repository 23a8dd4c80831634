"""The `vrag` command: each sub-command calls the function of the package that the notebooks call.

vrag ask FOLDER "question"            answer with page and region, offline
vrag COMMAND --help                   what a command takes
vrag config                           every setting, for `key=value` overrides
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vrag_lib import __version__, cli_experiments
from vrag_lib.cli_options import (
    add_command,
    add_policy_options,
    add_retriever_options,
    check_retriever,
    interval_table,
    overridden,
    parse,
    read_config,
    read_policy_config,
    retriever_settings,
)
from vrag_lib.config import cache_dir, describe
from vrag_lib.presets import EXPERIMENTS, PRESETS
from vrag_lib.provenance import commit


def build_parser() -> argparse.ArgumentParser:
    """The command line with all its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="vrag", description="A reproduction of VRAG-RL: search page images, look closer, answer, learn."
    )
    parser.add_argument("--version", action="version", version=f"vrag {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for add in (_ask, _index, _serve, _view, _eval_retrieval, _config, *cli_experiments.COMMANDS):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that name a wrong input end with status 2 and one line, not a traceback."""
    arguments = parse(build_parser(), sys.argv[1:] if argv is None else argv)
    log = logging.StreamHandler()
    log.setFormatter(_Visible("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    commit()
    try:
        with _stop_on_terminate():
            return arguments.run(arguments) or 0
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        if arguments.traceback:
            raise
        print(f"vrag {arguments.command}: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 2)
    except KeyboardInterrupt:
        print("interrupted; finished parts are kept and the same command goes on from them", file=sys.stderr)
        return 130


class _Visible(logging.Formatter):
    """Messages name files and quote servers: what would steer a terminal is written out."""

    def format(self, record: logging.LogRecord) -> str:
        from vrag_lib.viewer import visible

        return visible(super().format(record))


@contextmanager
def _stop_on_terminate() -> Iterator[None]:
    """Ends as after Ctrl-C, what is finished being written, when a scheduler ends the job."""
    main = os.getpid()

    def stop(number, frame) -> None:
        if os.getpid() != main:  # a forked helper has nothing to write
            os._exit(128 + number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # no other may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ask(commands) -> None:
    def run(arguments) -> int:
        from vrag_lib.ask import ask
        from vrag_lib.trajectory import StopReason

        named = retriever_settings(arguments) | {"results": arguments.out}
        config = check_retriever(arguments, read_policy_config(arguments, named))
        answer = ask(arguments.path, arguments.question, config)
        print(answer.report())
        print(f"viewer  {answer.viewer}")
        return 1 if answer.trajectory.stop_reason is StopReason.ERROR else 0

    what = "answer a question from a folder of PDFs or images, offline by default"
    positionals = [("path", "folder or file of documents"), ("question", "the question, quoted")]
    parser = add_command(commands, "ask", run, what, positionals)
    add_policy_options(parser, "the preset's; laptop: extractive, no model")
    add_retriever_options(parser, "text, bm25, dense, visual or remote")
    parser.add_argument("--out", help="results folder (default: results); each run has a folder of its own in it")


def _index(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.factory import make_retriever, open_corpus, require_retriever

        config = check_retriever(arguments, read_config(arguments, retriever_settings(arguments)))
        require_retriever(config)
        corpus = open_corpus(arguments.path, config)
        retriever = make_retriever(corpus, config)
        print(f"{len(corpus.documents)} documents, {len(corpus.pages)} pages, {len(corpus.problems)} left out")
        print(f"index  {retriever.name}; pages, text and embeddings are kept in {cache_dir()}")

    what = "render, read and index documents ahead of time, so that later commands start at once"
    parser = add_command(commands, "index", run, what, [("path", "folder or file of documents")])
    add_retriever_options(parser, "text, bm25, dense, visual or remote", "--model")


def _serve(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.factory import make_retriever, open_corpus, require_retriever
        from vrag_lib.search_server import serve

        if not 0 < arguments.port < 65536:
            raise ValueError(f"--port lies between 1 and 65535, not at {arguments.port}")
        config = check_retriever(arguments, read_config(arguments, retriever_settings(arguments)))
        require_retriever(config)
        corpus = open_corpus(arguments.path, config)
        with suppress(KeyboardInterrupt):  # how it is stopped, and nothing goes wrong then
            serve(make_retriever(corpus, config), corpus, arguments.host, arguments.port, top_k=config.retrieval.depth)

    what = "answer GET /search as the authors' search server does"
    parser = add_command(commands, "serve", run, what, [("path", "folder or file of documents")])
    add_retriever_options(parser, "text, bm25, dense or visual", "--model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8002, help="port (default: %(default)s, as the authors')")


def _view(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.factory import open_corpus
        from vrag_lib.trajectory import read_trajectories
        from vrag_lib.viewer import trajectory_html, unlike_record

        if arguments.most < 1:
            raise ValueError(f"--most is a number of trajectories, at least 1, not {arguments.most}")
        trajectories = read_trajectories(arguments.trajectories)[: arguments.most]
        corpus = open_corpus(arguments.path, read_config(arguments, {"corpus.ocr": "none"}))
        for problem in unlike_record(trajectories, corpus):
            print(f"WARNING: {problem}", file=sys.stderr)
        page = trajectory_html(trajectories, corpus, title=Path(arguments.trajectories).stem)
        target = Path(arguments.out or Path(arguments.trajectories).with_suffix(".html"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
        print(f"viewer  {target}")

    what = "write one HTML page that shows a file of trajectories"
    documents = "the documents they were made from; others with files of the same names and page sizes pass unnoticed"
    positionals = [("trajectories", "a trajectories.parquet"), ("path", documents)]
    parser = add_command(commands, "view", run, what, positionals)
    parser.add_argument("--most", type=int, default=50, help="trajectories shown (default: %(default)s)")
    parser.add_argument("--out", help="HTML file (default: beside the parquet file)")


_SHOWN = ("R@1", "R@5", "R@10", "MRR@5", "nDCG@5")
"""The metrics that `vrag eval-retrieval` prints, as far as a line holds them."""


def _eval_retrieval(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.dataset_hub import find_dataset
        from vrag_lib.evaluate_retrieval import default_folder, run_eval_retrieval

        config = read_config(arguments)
        if unused := [key for key in overridden(arguments) if key.startswith(("retrieval.", "corpus."))
                      and key != "corpus.workers"]:  # fmt: skip
            raise ValueError(f"{unused[0]} changes nothing here: the table compares methods that it sets up itself")
        out = Path(arguments.out or default_folder(config, arguments.dataset))
        dataset = find_dataset(arguments.dataset)
        if not dataset.exists():
            raise ValueError(f"{dataset} does not exist; give the folder of a benchmark, or one of its names (--help)")
        table = run_eval_retrieval(dataset, out, workers=config.corpus.workers, seed=config.seed)
        print(f"percent, 95 % intervals over questions\n{interval_table(table, ['method'], _SHOWN)}")
        print(f"all columns  {out / 'metrics.csv'}")

    what = "measure retrieval methods on a document benchmark: recall, nDCG, MRR with 95 % intervals, seconds"
    positionals = [("dataset", "folder of documents and questions, or slidevqa, vidoseek or mmlongbench_doc")]
    parser = add_command(commands, "eval-retrieval", run, what, positionals)
    parser.add_argument("--out", help="results folder (default: results/<preset>/retrieval_<dataset>)")


def _config(commands) -> None:
    def run(arguments) -> None:
        # What training takes is asked of the settings that training runs with.
        experiment = arguments.experiment or bool(arguments.memory)
        config = read_config(arguments, experiment=experiment)
        if arguments.memory:
            from vrag_lib.memory import expected_memory

            print(expected_memory(config, arguments.memory, arguments.shards, arguments.card))
        else:
            print(f"{_whose(arguments.preset, experiment)}\n{describe(config)}")

    parser = add_command(commands, "config", run, "print every setting of a preset with its meaning")
    parser.add_argument("--experiment", action="store_true", help="as the stages of the paper's experiment use it")
    parser.add_argument("--memory", choices=("sft", "grpo"), help="print the card memory that training should take")
    parser.add_argument("--shards", type=int, default=1, help="cards that share out the weights (launch/fsdp.yaml)")
    parser.add_argument("--card", type=float, metavar="GIB", help="size of a card: counts vLLM's share of it")


def _whose(preset: str, experiment: bool) -> str:
    """Comment lines: which commands run with the settings below, and how the others' are seen."""
    if EXPERIMENTS[preset] == PRESETS[preset]:
        return f"# Settings of every command with --preset {preset}."
    documents = f"ask, index, serve, view, eval-retrieval and evaluate (but of minidocs): vrag config --preset {preset}"
    stages = (
        f"synthesize, sft, grpo, evaluate (of minidocs), reproduce-paper: vrag config --preset {preset} --experiment"
    )
    here, there = (stages, documents) if experiment else (documents, stages)
    return f"# Shown here, settings of {here}\n# The others, those of {there}"


if __name__ == "__main__":
    sys.exit(main())
