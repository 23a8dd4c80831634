"""The `vrag` command: each sub-command calls the function of the package that the notebooks call.

vrag ask FOLDER "question"            answer with page and region, offline
vrag COMMAND --help                   what a command takes
vrag config                           every setting, for `key=value` overrides
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vrag_lib import __version__
from vrag_lib.config import PRESETS, Config, cache_dir, describe, load_config


def build_parser() -> argparse.ArgumentParser:
    """The command line with all its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="vrag", description="A reproduction of VRAG-RL: search page images, look closer, answer, learn."
    )
    parser.add_argument("--version", action="version", version=f"vrag {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for add in (
        _ask,
        _index,
        _serve,
        _view,
        _eval_retrieval,
        _bench,
        _minidocs,
        _scale_model,
        _synthesize,
        _sft,
        _grpo,
        _evaluate,
        _config,
        _reproduce,
        _reproduce_paper,
    ):
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


def _command(
    commands, name: str, run, help_text: str, positionals: Sequence[tuple[str, str]] = ()
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog="Settings of the preset are changed by key=value arguments; `vrag config` lists them.",
    )
    parser.set_defaults(run=run)
    for positional, text in positionals:
        parser.add_argument(positional, help=text)
    parser.add_argument("--preset", default="laptop", help=f"one of {', '.join(PRESETS)} (default: %(default)s)")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    return parser


def _read(arguments: argparse.Namespace, named: Mapping[str, object] | None = None, experiment: bool = False) -> Config:
    """The preset, then options given by name, then `key=value` overrides: the later wins."""
    options = [f"{key}={value}" for key, value in (named or {}).items() if value is not None]
    return load_config(arguments.preset, [*options, *arguments.overrides], experiment)


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
        answer = ask(arguments.path, arguments.question, _read(arguments, named))
        print(answer.report())
        print(f"viewer  {answer.viewer}")

    what = "answer a question from a folder of PDFs or images, offline by default"
    positionals = [("path", "folder or file of documents"), ("question", "the question, quoted")]
    parser = _command(commands, "ask", run, what, positionals)
    parser.add_argument("--policy", help="extractive (default, no model), transformers or openai")
    parser.add_argument("--model", help="the policy's model: path, hub id or the endpoint's name for it")
    parser.add_argument("--base-url", help="endpoint of an OpenAI-compatible server, up to and including /v1")
    parser.add_argument("--retriever", help="text (default), bm25, dense, visual or remote")
    parser.add_argument("--out", help="results folder (default: results)")


def _index(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.factory import make_retriever, open_corpus

        named = {"retrieval.kind": arguments.retriever, "retrieval.model": arguments.model}
        config = _read(arguments, named)
        corpus = open_corpus(arguments.path, config)
        retriever = make_retriever(corpus, config)
        print(f"{len(corpus.documents)} documents, {len(corpus.pages)} pages, {len(corpus.problems)} left out")
        print(f"index  {retriever.name}; pages, text and embeddings are kept in {cache_dir()}")

    what = "render, read and index documents ahead of time, so that later commands start at once"
    parser = _command(commands, "index", run, what, [("path", "folder or file of documents")])
    parser.add_argument("--retriever", help="text (default), bm25, dense, visual or remote")
    parser.add_argument("--model", help="visual: path or hub id of a ColPali-type model")


def _serve(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.factory import make_retriever, open_corpus
        from vrag_lib.search_server import serve

        named = {"retrieval.kind": arguments.retriever, "retrieval.model": arguments.model}
        config = _read(arguments, named)
        corpus = open_corpus(arguments.path, config)
        serve(make_retriever(corpus, config), corpus, arguments.host, arguments.port, top_k=config.retrieval.depth)

    what = "answer GET /search as the authors' search server does"
    parser = _command(commands, "serve", run, what, [("path", "folder or file of documents")])
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
        corpus = open_corpus(arguments.path, _read(arguments, {"corpus.ocr": "none"}))
        page = trajectory_html(trajectories, corpus, title=Path(arguments.trajectories).stem)
        target = Path(arguments.out or Path(arguments.trajectories).with_suffix(".html"))
        target.write_text(page, encoding="utf-8")
        print(f"viewer  {target}")

    what = "write one HTML page that shows a file of trajectories"
    positionals = [("trajectories", "a trajectories.parquet"), ("path", "the documents they were made from")]
    parser = _command(commands, "view", run, what, positionals)
    parser.add_argument("--most", type=int, default=50, help="trajectories shown (default: %(default)s)")
    parser.add_argument("--out", help="HTML file (default: beside the parquet file)")


def _eval_retrieval(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.dataset_hub import find_dataset
        from vrag_lib.evaluate_retrieval import run_eval_retrieval

        config = _read(arguments)
        out = arguments.out or config.folder("retrieval")
        dataset = find_dataset(arguments.dataset)
        table = run_eval_retrieval(dataset, out, workers=config.corpus.workers, seed=config.seed)
        print(table.to_string(index=False))
        print(f"written to {out}")

    what = "measure retrieval methods on a document benchmark: recall, nDCG, MRR with 95 %% intervals, seconds"
    positionals = [("dataset", "folder of documents and questions, or slidevqa, vidoseek or mmlongbench_doc")]
    parser = _command(commands, "eval-retrieval", run, what, positionals)
    parser.add_argument("--out", help="results folder (default: results/<preset>/retrieval)")


def _bench(commands) -> None:
    def search(arguments) -> None:
        from vrag_lib.bench import bench_search

        config = _read(arguments)
        out = Path(arguments.out or config.folder("bench_search"))
        print(bench_search(pages=tuple(arguments.pages), out_dir=out, seed=config.seed).to_string(index=False))
        print(f"written to {out}")

    def against_trl(arguments) -> None:
        if arguments.benchmark == "rollout":
            from vrag_lib.bench_rollout import run_bench_rollout as run
        else:
            from vrag_lib.bench_update import run_bench_update as run

        config = _read(arguments, {"seed": arguments.seed}, experiment=True)
        out = Path(arguments.out or config.folder(f"bench_{arguments.benchmark}"))
        table = run(config, arguments.model, arguments.questions, arguments.group, arguments.repeats, out)
        print(table.T.to_string(header=False))
        print(f"written to {out}")

    bench = commands.add_parser("bench", help="time the package against what it replaces", description="Benchmarks.")
    kinds = bench.add_subparsers(title="benchmarks", dest="benchmark", required=True, metavar="BENCHMARK")
    what = "time exact MaxSim against colpali-engine's scorer and byaldi's search on the same embeddings"
    parser = _command(kinds, "search", search, what)
    parser.add_argument("--pages", type=int, nargs="+", default=[500, 2000, 10000], help="index sizes to time")
    parser.add_argument("--out", help="results folder (default: results/<preset>/bench_search)")
    rollout_text = "time rollouts against stock TRL's over the same environment, and compare the tokens"
    update_text = "time one GRPO update against stock TRL's on the same trajectories, and compare loss and gradient"
    for name, what in (("rollout", rollout_text), ("update", update_text)):
        parser = _command(kinds, name, against_trl, what)
        parser.add_argument("--model", help="checkpoint (default: the shipped one, or one of random weights)")
        parser.add_argument("--questions", type=int, default=4, help="questions of MiniDocs (default: %(default)s)")
        parser.add_argument("--group", type=int, default=4, help="trajectories per question (default: %(default)s)")
        parser.add_argument("--repeats", type=int, default=3, help="turns that are counted (default: %(default)s)")
        parser.add_argument("--seed", type=int, help="seed of weights and trajectories (default: the preset's)")
        parser.add_argument("--out", help=f"results folder (default: results/<preset>/bench_{name})")


def _minidocs(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.minidocs import MiniDocs

        docs = MiniDocs(_read(arguments).minidocs)
        docs.write(arguments.out, form=arguments.form, splits=arguments.splits)
        if arguments.card:
            from vrag_lib.minidocs_card import write_card

            write_card(arguments.out, docs)
        print(f"written to {arguments.out}: {', '.join(arguments.splits)}")

    what = "write the generated benchmark: documents and questions whose answers, pages and regions are exact"
    parser = _command(commands, "minidocs", run, what, [("out", "folder to write to")])
    parser.add_argument("--form", choices=["pdf", "images"], default="pdf", help="documents as (default: %(default)s)")
    parser.add_argument("--splits", nargs="+", default=["train", "validation", "test"], help="splits to write")
    parser.add_argument("--card", action="store_true", help="also write the data card with counts and pictures")


def _scale_model(commands) -> None:
    def prepare(arguments, name: str, kind: str) -> tuple[Config, Path, Path, Path]:
        """The config, where the model, its training checkpoints and its curves go; the same call goes on after a
        kill. The number of threads is part of what makes a run repeatable."""
        import torch

        torch.set_num_threads(arguments.threads)
        config = _read(arguments)
        work = cache_dir() / "scale_model" / name
        return config, Path(arguments.out or work / f"final-{name}"), work, config.folder("scale_model") / kind

    def policy(arguments) -> None:
        from vrag_lib.scale_make import make_policy
        from vrag_lib.scale_training import PolicyTraining

        config, out, work, results = prepare(arguments, "policy", "policy")
        recipe = PolicyTraining(seed=config.seed)
        if arguments.recipe == "large":
            recipe = PolicyTraining.large(config.seed)
        elif arguments.hours:
            recipe = PolicyTraining.of_hours(arguments.hours, config.seed)
        processes = arguments.processes if arguments.device == "cpu" else 1
        make_policy(
            out, results, work / arguments.recipe, recipe, device=arguments.device, workers=arguments.workers,
            processes=processes,
        )  # fmt: skip
        print(f"model  {out}\ncurves and evaluation  {results}")

    def retriever(arguments) -> None:
        from vrag_lib.scale_make import draw_curves
        from vrag_lib.scale_retriever_evaluation import evaluate_retriever, model_card
        from vrag_lib.scale_retriever_training import train_retriever

        config, out, work, results = prepare(arguments, "colqwen2", "retriever")
        train_retriever(out, arguments.hours, config.seed, work_dir=work, curves_dir=results)
        summary = evaluate_retriever(out, results, "test", config.minidocs, engine="native", dtype="float32")
        draw_curves(results)
        (out / "README.md").write_text(model_card(summary, arguments.hours, config.seed), encoding="utf-8")
        print(f"model  {out}\ncurves and evaluation  {results}")

    def report(arguments) -> None:
        from vrag_lib.minidocs_report import report

        config = _read(arguments)
        measured, out = config.folder("scale_model"), config.folder("minidocs")
        report(
            arguments.policy, measured / "retriever" / "test.json", measured / "policy" / "perception_probes.csv", out
        )
        print((out / "README.md").read_text())

    models = commands.add_parser("scale-model", help="train the laptop's tiny models", description="Scale models.")
    kinds = models.add_subparsers(title="models", dest="model", required=True, metavar="MODEL")
    policy_text = "train the tiny Qwen2.5-VL to read MiniDocs pages, from nothing, and measure it on the test split"
    retriever_text = "train the tiny ColQwen2 to find MiniDocs pages, from nothing, and measure it on the test split"
    for name, run, what in (("policy", policy, policy_text), ("retriever", retriever, retriever_text)):
        parser = _command(kinds, name, run, what)
        parser.add_argument("--threads", type=int, default=1, help="processor threads (default: %(default)s)")
        parser.add_argument("--out", help="folder of the model (default: below the cache)")
        if name == "policy":
            hours = "cut or stretch the small recipe to about so long, with two processes (default: as it is, 1.5)"
            parser.add_argument("--hours", type=float, help=hours)
            recipes = "small: for a processor; large: wider steps for an accelerator (small)"
            parser.add_argument("--recipe", choices=["small", "large"], default="small", help=recipes)
            parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (cpu)")
            parser.add_argument("--workers", type=int, default=0, help="processes that make the data (0)")
            parser.add_argument("--processes", type=int, default=2, help="that train together on the processor (2)")
        else:
            parser.add_argument("--hours", type=float, default=3.0, help="length on one free core; sets the steps (3)")
    parser = _command(
        kinds, "report", report, "measure on the test split what makes MiniDocs hard for the scale models"
    )
    parser.add_argument("--policy", default="data/scale_policy", help="folder of the scale policy (%(default)s)")


def _synthesize(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.stages import synthesize

        folder = synthesize(_read(arguments, experiment=True))
        print((folder / "README.md").read_text())

    what = "let experts write trajectories for the cold start, filter and balance them, export them"
    _command(commands, "synthesize", run, what)


def _sft(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.stages import fine_tune

        print(f"model  {fine_tune(_read(arguments, experiment=True), trajectories=arguments.trajectories)}")

    parser = _command(commands, "sft", run, "fine-tune the policy on the trajectories of `vrag synthesize`")
    parser.add_argument("--trajectories", type=int, help="train on the first so many of them (default: all)")


def _grpo(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.grpo_runs import draw_runs, keep_sample
        from vrag_lib.stages import reinforce
        from vrag_lib.training import is_main_process

        config = _read(arguments, experiment=True)
        model = reinforce(config, arguments.checkpoint, seed=arguments.seed, judge=_judge(arguments, config))
        if is_main_process():
            keep_sample(model.parent, config.grpo.group_size)
            print(f"model  {model}\ncurves {draw_runs(config.folder('grpo'), config.grpo.recipe)}")

    what = "train the policy by GRPO on the questions that `vrag synthesize` set apart"
    parser = _command(commands, "grpo", run, what, [("checkpoint", "folder of the policy to start from")])
    parser.add_argument("--seed", type=int, help="seed of the training, on the same questions (default: the preset's)")
    _judge_options(parser)


def _judge_options(parser) -> None:
    parser.add_argument("--judge-model", help="let this model behind an endpoint judge (default: the rule judge)")
    parser.add_argument("--judge-url", help="the judge's endpoint (default: the policy's)")


def _judge(arguments, config):
    from vrag_lib.judge import rule_judge

    if not arguments.judge_model:
        return rule_judge
    from vrag_lib.judge_openai import OpenAIJudge

    url = arguments.judge_url or config.policy.base_url
    if not url:
        raise ValueError("--judge-model needs --judge-url, or policy.base_url= where the policy's endpoint judges too")
    return OpenAIJudge(url, arguments.judge_model, api_key_env=config.policy.api_key_env)


def _evaluate(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.evaluate import summary_table
        from vrag_lib.evaluate_datasets import evaluate_datasets

        named = {
            "policy.kind": arguments.policy,
            "policy.model": arguments.model,
            "policy.base_url": arguments.base_url,
        }
        names, paths = arguments.dataset or ["minidocs"], arguments.path or []
        if paths and len(paths) != len(names):
            raise ValueError("--path is given once for each --dataset, in the same order, or not at all")
        config = _read(arguments, named, experiment=names == ["minidocs"])
        frame = evaluate_datasets(
            dict(zip(names, paths or [None] * len(names), strict=True)), config, arguments.out, agent=arguments.agent,
            split=arguments.split, limit=arguments.limit, partial=arguments.partial, seeds=arguments.seeds,
            judge=_judge(arguments, config),
        )  # fmt: skip
        print(summary_table(frame).round(3).to_string(index=False))

    what = "measure an agent on benchmarks: minidocs, public ones (fetched once), or local copies"
    parser = _command(commands, "evaluate", run, what)
    datasets = "minidocs (default), slidevqa, vidoseek, mmlongbench_doc or unified; repeated: one merged corpus"
    parser.add_argument("--dataset", action="append", metavar="NAME", help=datasets)
    paths = "folder of the dataset, once for each --dataset (default: fetched from the hub, kept in the cache)"
    parser.add_argument("--path", action="append", metavar="FOLDER", help=paths)
    parser.add_argument("--partial", action="store_true", help="leave out questions on documents that are missing")
    parser.add_argument("--split", default="test", help="minidocs: train, validation or test (default: %(default)s)")
    agents = "what the policy may do and is shown: vrag_rl, react, vanilla_rag_5, ... (default: %(default)s)"
    parser.add_argument("--agent", default="vrag_rl", help=agents)
    parser.add_argument("--policy", help="extractive, transformers or openai (default: the preset's)")
    parser.add_argument("--model", help="the policy's model: path, hub id or the endpoint's name for it")
    parser.add_argument("--base-url", help="endpoint of an OpenAI-compatible server, up to and including /v1")
    _judge_options(parser)
    parser.add_argument("--limit", type=int, help="ask only so many questions, evenly spread")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of sampling, one pass each")
    parser.add_argument("--out", help="results folder (default: below the preset's)")


def _config(commands) -> None:
    def run(arguments) -> None:
        config = _read(arguments, experiment=arguments.experiment)
        if arguments.memory:
            from vrag_lib.memory import expected_memory

            print(expected_memory(config, arguments.memory, arguments.shards))
        else:
            print(describe(config))

    parser = _command(commands, "config", run, "print every setting of a preset with its meaning")
    parser.add_argument("--experiment", action="store_true", help="as the stages of the paper's experiment use it")
    parser.add_argument("--memory", choices=("sft", "grpo"), help="print the card memory that training should take")
    parser.add_argument("--shards", type=int, default=1, help="cards that share out the weights (launch/fsdp.yaml)")


def _reproduce(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.notebooks import repository, reproduce

        config = _read(arguments)
        reproduce(config, arguments.overrides, force=arguments.force, save_outputs=arguments.save_outputs)
        where = repository() / config.folder("")
        print(f"done; look at {where}/ (figures, tables, trajectories) and {where}/notebooks/ (executed notebooks)")

    parser = _command(commands, "reproduce", run, "run every notebook in order and write results/<preset>/")
    parser.add_argument(
        "--force", action="store_true", help="also run notebooks that are unchanged since their last run"
    )
    parser.add_argument("--save-outputs", action="store_true", help="keep the outputs in notebooks/ as well")


def _reproduce_paper(commands) -> None:
    def run(arguments) -> int:
        from vrag_lib.matrix import run_matrix, states
        from vrag_lib.report import write_report

        if arguments.cells:  # settings may stand anywhere, so also behind the names
            arguments.overrides += [text for text in arguments.cells if "=" in text]
            arguments.cells = [text for text in arguments.cells if "=" not in text]
        config = _read(arguments, experiment=True)
        if arguments.list:
            for outcome in states(config, arguments.cells, arguments.seeds):
                print(f"{outcome.cell:20} seed {outcome.seed}  {outcome.state}  {outcome.error}".rstrip())
            return 0
        failed = []
        if not arguments.report_only:
            outcomes = run_matrix(
                config,
                arguments.cells,
                arguments.seeds,
                arguments.format_trajectories,
                arguments.first_seed,
                arguments.cold_starts,
            )
            failed = [outcome for outcome in outcomes if outcome.state == "failed"]
            for outcome in failed:
                print(f"failed: {outcome.cell}, seed {outcome.seed}: {outcome.error}", file=sys.stderr)
        print(f"report  {write_report(config, arguments.seeds)}")
        return 1 if failed else 0

    what = "run the paper's experiments and the ablations in miniature, cell by cell, and write tables and figures"
    parser = _command(commands, "reproduce-paper", run, what)
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="only these (default: all; --list names them)")
    parser.add_argument(
        "--seeds", type=int, default=5, help="training seeds of each trained cell (default: %(default)s)"
    )
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="leave out the seeds before this one")
    help_text = "SFT trainings that the seeds of RL begin with in turn (default: %(default)s, as the paper)"
    parser.add_argument("--cold-starts", type=int, default=1, metavar="N", help=help_text)
    parser.add_argument("--list", action="store_true", help="say what there is of each cell, and run nothing")
    parser.add_argument("--report-only", action="store_true", help="draw the report from finished cells, run nothing")
    help_text = "trajectories that teach the untrained policy its format; 0 for an instruct model (laptop: 400, else 0)"
    parser.add_argument("--format-trajectories", type=int, metavar="N", help=help_text)


if __name__ == "__main__":
    sys.exit(main())
