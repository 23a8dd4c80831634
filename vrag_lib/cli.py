"""The `vrag` command: each sub-command calls the function of the package that the notebooks call.

vrag ask FOLDER "question"            answer with page and region, offline
vrag COMMAND --help                   what a command takes
vrag config                           every setting, for `key=value` overrides
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vrag_lib import __version__, cli_experiments
from vrag_lib.cli_options import add_command, read_config
from vrag_lib.config import cache_dir, describe


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
    parser = build_parser()
    # Overrides may stand anywhere after the command, which argparse cannot declare: they are what it does not know.
    arguments, overrides = parser.parse_known_args(argv)
    unknown = [text for text in overrides if text.startswith("-") or "=" not in text]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}; settings are written key=value")
    arguments.overrides = overrides
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError, RuntimeError) as error:
        if arguments.traceback:
            raise
        print(f"vrag {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished parts are kept and the same command goes on from them", file=sys.stderr)
        return 130


def _ask(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.ask import ask

        named = {
            "policy.kind": arguments.policy,
            "policy.base_url": arguments.base_url,
            "policy.model": arguments.model,
            "retrieval.kind": arguments.retriever,
            "results": arguments.out,
        }
        answer = ask(arguments.path, arguments.question, read_config(arguments, named))
        print(answer.report())
        print(f"viewer  {answer.viewer}")

    what = "answer a question from a folder of PDFs or images, offline by default"
    positionals = [("path", "folder or file of documents"), ("question", "the question, quoted")]
    parser = add_command(commands, "ask", run, what, positionals)
    parser.add_argument("--policy", help="extractive (default, no model), transformers or openai")
    parser.add_argument("--model", help="the policy's model: path, hub id or the endpoint's name for it")
    parser.add_argument("--base-url", help="endpoint of an OpenAI-compatible server, up to and including /v1")
    parser.add_argument("--retriever", help="text (default), bm25, dense, visual or remote")
    parser.add_argument("--out", help="results folder (default: results)")


def _index(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.factory import make_retriever, open_corpus

        named = {"retrieval.kind": arguments.retriever, "retrieval.model": arguments.model}
        config = read_config(arguments, named)
        corpus = open_corpus(arguments.path, config)
        retriever = make_retriever(corpus, config)
        print(f"{len(corpus.documents)} documents, {len(corpus.pages)} pages, {len(corpus.problems)} left out")
        print(f"index  {retriever.name}; pages, text and embeddings are kept in {cache_dir()}")

    what = "render, read and index documents ahead of time, so that later commands start at once"
    parser = add_command(commands, "index", run, what, [("path", "folder or file of documents")])
    parser.add_argument("--retriever", help="text (default), bm25, dense, visual or remote")
    parser.add_argument("--model", help="visual: path or hub id of a ColPali-type model")


def _serve(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.factory import make_retriever, open_corpus
        from vrag_lib.search_server import serve

        named = {"retrieval.kind": arguments.retriever, "retrieval.model": arguments.model}
        config = read_config(arguments, named)
        corpus = open_corpus(arguments.path, config)
        serve(make_retriever(corpus, config), corpus, arguments.host, arguments.port, top_k=config.retrieval.depth)

    what = "answer GET /search as the authors' search server does"
    parser = add_command(commands, "serve", run, what, [("path", "folder or file of documents")])
    parser.add_argument("--retriever", help="text (default), bm25, dense or visual")
    parser.add_argument("--model", help="visual: path or hub id of a ColPali-type model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8002, help="port (default: %(default)s, as the authors')")


def _view(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.factory import open_corpus
        from vrag_lib.trajectory import read_trajectories
        from vrag_lib.viewer import trajectory_html

        trajectories = read_trajectories(arguments.trajectories)[: arguments.most]
        corpus = open_corpus(arguments.path, read_config(arguments, {"corpus.ocr": "none"}))
        page = trajectory_html(trajectories, corpus, title=Path(arguments.trajectories).stem)
        target = Path(arguments.out or Path(arguments.trajectories).with_suffix(".html"))
        target.write_text(page, encoding="utf-8")
        print(f"viewer  {target}")

    what = "write one HTML page that shows a file of trajectories"
    positionals = [("trajectories", "a trajectories.parquet"), ("path", "the documents they were made from")]
    parser = add_command(commands, "view", run, what, positionals)
    parser.add_argument("--most", type=int, default=50, help="trajectories shown (default: %(default)s)")
    parser.add_argument("--out", help="HTML file (default: beside the parquet file)")


def _eval_retrieval(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.dataset_hub import find_dataset
        from vrag_lib.evaluate_retrieval import run_eval_retrieval

        config = read_config(arguments)
        out = arguments.out or config.folder("retrieval")
        dataset = find_dataset(arguments.dataset)
        table = run_eval_retrieval(dataset, out, workers=config.corpus.workers, seed=config.seed)
        print(table.to_string(index=False))
        print(f"written to {out}")

    what = "measure retrieval methods on a document benchmark: recall, nDCG, MRR with 95 %% intervals, seconds"
    positionals = [("dataset", "folder of documents and questions, or slidevqa, vidoseek or mmlongbench_doc")]
    parser = add_command(commands, "eval-retrieval", run, what, positionals)
    parser.add_argument("--out", help="results folder (default: results/<preset>/retrieval)")


def _config(commands) -> None:
    def run(arguments) -> None:
        config = read_config(arguments, experiment=arguments.experiment)
        if arguments.memory:
            from vrag_lib.memory import expected_memory

            print(expected_memory(config, arguments.memory, arguments.shards))
        else:
            print(describe(config))

    parser = add_command(commands, "config", run, "print every setting of a preset with its meaning")
    parser.add_argument("--experiment", action="store_true", help="as the stages of the paper's experiment use it")
    parser.add_argument("--memory", choices=("sft", "grpo"), help="print the card memory that training should take")
    parser.add_argument("--shards", type=int, default=1, help="cards that share out the weights (launch/fsdp.yaml)")


if __name__ == "__main__":
    sys.exit(main())
