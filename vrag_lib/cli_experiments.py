"""The commands of the paper's experiment: data, training, evaluation, benchmarks, the scale models, reproduction.

`cli` holds the others, those of one's own documents.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vrag_lib.cli_options import (
    add_command,
    add_policy_options,
    add_several,
    interval_table,
    read_config,
    read_policy_config,
)
from vrag_lib.config import Config, ConfigError, cache_dir
from vrag_lib.settings import check_key_name, check_url, same_server


def _synthesize(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.stages import synthesize

        config = read_config(arguments, experiment=True)
        folder = synthesize(config, judge=_judge(arguments, config, vidorag_least=5))
        print((folder / "README.md").read_text())

    what = "let experts write trajectories for the cold start, filter and balance them, export them"
    _judge_options(add_command(commands, "synthesize", run, what))


def _sft(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.factory import require_device
        from vrag_lib.stages import fine_tune

        config = read_config(arguments, experiment=True)
        require_device("policy.device", config.policy.device)
        print(f"model  {fine_tune(config, trajectories=arguments.trajectories)}")

    parser = add_command(commands, "sft", run, "fine-tune the policy on the trajectories of `vrag synthesize`")
    parser.add_argument("--trajectories", type=int, help="train on the first so many of them (default: all)")


def _grpo(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.factory import require_device
        from vrag_lib.grpo_runs import draw_runs, keep_sample
        from vrag_lib.judge import rule_judge
        from vrag_lib.stages import reinforce
        from vrag_lib.training import is_main_process

        config = read_config(arguments, experiment=True)
        judge = _judge(arguments, config) or rule_judge
        require_device("policy.device", config.policy.device)
        model = reinforce(config, arguments.checkpoint, seed=arguments.seed, judge=judge)
        if is_main_process():
            keep_sample(model.parent, config.grpo.group_size)
            print(f"model  {model}\ncurves {draw_runs(config.folder('grpo'), config.grpo.recipe)}")

    what = "train the policy by GRPO on the questions that `vrag synthesize` set apart"
    parser = add_command(commands, "grpo", run, what, [("checkpoint", "folder of the policy to start from")])
    parser.add_argument("--seed", type=int, help="seed of the training, on the same questions (default: the preset's)")
    _judge_options(parser)


def _merge(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.training import base_of, merge_adapter

        base, out = base_of(arguments.adapter, arguments.checkpoint), Path(arguments.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is there already; name a new folder, or delete it")
        try:
            print(f"model  {merge_adapter(base, arguments.adapter, out, arguments.dtype)}")
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{arguments.adapter} and {base} cannot be merged; is that the checkpoint the adapter was trained on? "
                f"Name it with --checkpoint. {' '.join(str(error).split())[:400]}"
            ) from error

    what = (
        "add a LoRA adapter, which training with LoRA leaves, to its checkpoint, for other programs: every command "
        "here takes the adapter, too, and in bfloat16 the merge rounds away much of what RL changed"
    )
    positionals = [("adapter", "the `final` folder of a training run"), ("out", "folder of the model, a new one")]
    parser = add_command(commands, "merge", run, what, positionals)
    help_text = "folder or hub id that the adapter was trained on (default: the one that it names itself)"
    parser.add_argument("--checkpoint", metavar="BASE", help=help_text)
    dtypes = "numbers of the model: auto, as its checkpoint (default), bfloat16, or float32, which loses nothing"
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help=dtypes)


def _evaluate(commands) -> None:
    def run(arguments) -> int:
        from vrag_lib.agents import find_agent
        from vrag_lib.answer_metrics import OFFICIAL_METRICS
        from vrag_lib.evaluate import summary_table
        from vrag_lib.evaluate_datasets import evaluate_datasets, evaluation_folder
        from vrag_lib.factory import require_policy, require_retriever
        from vrag_lib.judge import rule_judge

        names, paths = arguments.dataset or ["minidocs"], arguments.path or []
        if paths and not arguments.dataset:
            raise ValueError(f"--path {paths[0]} of which --dataset? Documents and questions of one's own are unified")
        if paths and len(paths) != len(names):
            raise ValueError("--path is given once for each --dataset, in the same order, or not at all")
        if len(set(names)) < len(names):
            raise ValueError("a dataset is named twice: put its parts into one folder, or measure them one by one")
        find_agent(arguments.agent)
        config = read_policy_config(arguments, {"policy.temperature": 0.0}, experiment=names == ["minidocs"])
        if len(arguments.seeds or ()) > 1 and config.policy.temperature == 0:
            print("WARNING: greedy replies are the same for every seed; policy.temperature=1 samples", file=sys.stderr)
        judge = _judge(arguments, config) or rule_judge
        require_policy(config)
        require_retriever(config)
        out = Path(arguments.out or evaluation_folder(names, config, arguments.agent))
        frame = evaluate_datasets(
            dict(zip(names, paths or [None] * len(names), strict=True)), config, out, agent=arguments.agent,
            split=arguments.split, limit=arguments.limit, partial=arguments.partial, seeds=arguments.seeds,
            judge=judge, answerable_only=not arguments.unanswerable,
        )  # fmt: skip
        official = [metric for name in names for metric in OFFICIAL_METRICS[name]]
        metrics = ["accuracy", *official, "finish_rate", "ndcg", "invalid_rate"]
        shown = interval_table(summary_table(frame), ["by", "group", "n"], metrics, scale=100)
        print(f"percent, 95 % intervals over questions\n{shown}\nall columns  {out / 'summary.csv'}")
        return _report_unjudged(frame)

    what = (
        "measure an agent on benchmarks: minidocs, public ones (fetched once), or local copies; replies are greedy, as "
        "in the released code's validation, unless policy.temperature= says otherwise"
    )
    parser = add_command(commands, "evaluate", run, what)
    datasets = "minidocs (default), slidevqa, vidoseek, mmlongbench_doc or unified; repeated: one merged corpus"
    parser.add_argument("--dataset", action="append", metavar="NAME", help=datasets)
    paths = "folder of the dataset, once for each --dataset (default: fetched from the hub, kept in the cache)"
    parser.add_argument("--path", action="append", metavar="FOLDER", help=paths)
    parser.add_argument("--partial", action="store_true", help="leave out questions on documents that are missing")
    parser.add_argument("--split", default="test", help="minidocs: train, validation or test (default: %(default)s)")
    without = "ask questions that the documents do not answer, too, whose right answer says so"
    parser.add_argument("--unanswerable", action="store_true", help=without)
    agents = "what the policy may do and is shown: vrag_rl, react, vanilla_rag_5, ... (default: %(default)s)"
    parser.add_argument("--agent", default="vrag_rl", help=agents)
    add_policy_options(parser, "the preset's")
    _judge_options(parser)
    parser.add_argument("--limit", type=int, help="ask only so many questions, evenly spread")
    add_several(parser, "--seeds", int, help="seeds of sampling, one pass each (default: seed=)")
    parser.add_argument("--out", help="results folder (default: below the preset's)")


def _report_unjudged(frame) -> int:
    """Says on stderr how many answers the judge gave no verdict on. The exit status: 1 where it gave none at all."""
    from vrag_lib.judge import MAX_ANSWER_CHARS

    unjudged = int(frame["judge"].isna().sum())
    if not unjudged:
        return 0
    asked = [text for text in frame["answer"] if text.strip() and len(text) <= MAX_ANSWER_CHARS]
    print(
        f"vrag evaluate: the judge gave no verdict on {unjudged} of {len(asked)} answers, which are taken to be right "
        "as often as the others, if there are any; the same command keeps trajectories and verdicts and asks for those "
        "that are missing",
        file=sys.stderr,
    )
    return 1 if unjudged >= len(asked) else 0


def _judge_options(parser) -> None:
    parser.add_argument("--judge-model", help="let this model behind an endpoint judge (default: the rule judge)")
    parser.add_argument("--judge-url", help="the judge's endpoint (default: the policy's)")
    judges = (
        "its question: right or wrong as in the paper (default), or ViDoRAG's 1 to 5 points, of which 4 are right (in "
        "synthesis 5)"
    )
    keys = (
        "environment variable that holds the key of the judge's endpoint (default: policy.api_key_env, sent where "
        "--judge-url is on the policy's server or the policy has no endpoint; no key to any other server)"
    )
    parser.add_argument("--judge-key-env", metavar="NAME", help=keys)
    parser.add_argument("--judge-protocol", choices=("paper", "vidorag"), help=judges)


def _judge(arguments, config, vidorag_least: int = 4):
    """The model that judges; None without --judge-model. vidorag_least: points of ViDoRAG's protocol that are right.

    Raises ValueError for options that do not make one.
    """
    if not arguments.judge_model:
        for option in ("--judge-url", "--judge-key-env", "--judge-protocol"):
            if getattr(arguments, option[2:].replace("-", "_")) is not None:
                raise ValueError(f"{option} has no use without --judge-model: leave it out, or name the judge's model")
        return None
    from vrag_lib.judge_openai import OpenAIJudge, ViDoRAGJudge

    url = arguments.judge_url or config.policy.base_url
    if not url:
        raise ValueError("--judge-model needs --judge-url, or policy.base_url= where the policy's endpoint judges too")
    check_url("--judge-url", url, "; --judge-key-env names the environment variable that holds a key")
    key = _judge_key_env(arguments, config, url)
    if arguments.judge_protocol == "vidorag":
        return ViDoRAGJudge(url, arguments.judge_model, vidorag_least, api_key_env=key)
    return OpenAIJudge(url, arguments.judge_model, api_key_env=key)


def _judge_key_env(arguments, config, url: str) -> str:
    """The variable that holds the judge's key, '' for none: the policy's key is not for other servers. Raises
    ConfigError for a key in place of its variable, and for a variable that is not set."""
    if arguments.judge_key_env is not None:
        check_key_name("--judge-key-env", arguments.judge_key_env)
        if arguments.judge_key_env and not os.environ.get(arguments.judge_key_env):
            raise ConfigError("--judge-key-env names an environment variable that is not set: export the key first")
        return arguments.judge_key_env
    base = config.policy.base_url
    return config.policy.api_key_env if not base or same_server(base, url) else ""


def _minidocs(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.minidocs import MiniDocs

        docs = MiniDocs(read_config(arguments).minidocs)
        docs.write(arguments.out, form=arguments.form, splits=arguments.splits)
        if arguments.card:
            from vrag_lib.minidocs_card import write_card

            write_card(arguments.out, docs)
        print(f"written to {arguments.out}: {', '.join(arguments.splits)}")

    what = "write the generated benchmark: documents and questions whose answers, pages and regions are exact"
    parser = add_command(commands, "minidocs", run, what, [("out", "folder to write to")])
    parser.add_argument("--form", choices=["pdf", "images"], default="pdf", help="documents as (default: %(default)s)")
    add_several(parser, "--splits", default=["train", "validation", "test"], help="splits to write")
    parser.add_argument("--card", action="store_true", help="also write the data card with counts and pictures")


def _bench(commands) -> None:
    def search(arguments) -> None:
        from vrag_lib.bench import bench_search

        config = read_config(arguments)
        out = Path(arguments.out or config.folder("bench_search"))
        print(bench_search(pages=tuple(arguments.pages), out_dir=out, seed=config.seed).to_string(index=False))
        print(f"written to {out}")

    def against_trl(arguments) -> None:
        if arguments.benchmark == "rollout":
            from vrag_lib.bench_rollout import run_bench_rollout as run
        else:
            from vrag_lib.bench_update import run_bench_update as run
        from vrag_lib.factory import require_device

        config = read_config(arguments, {"seed": arguments.seed}, experiment=True)
        require_device("policy.device", config.policy.device)
        out = Path(arguments.out or config.folder(f"bench_{arguments.benchmark}"))
        table = run(config, arguments.model, arguments.questions, arguments.group, arguments.repeats, out)
        print(table.T.to_string(header=False))
        print(f"written to {out}")

    bench = commands.add_parser("bench", help="time the package against what it replaces", description="Benchmarks.")
    kinds = bench.add_subparsers(title="benchmarks", dest="benchmark", required=True, metavar="BENCHMARK")
    what = "time exact MaxSim against colpali-engine's scorer and byaldi's search on the same embeddings"
    parser = add_command(kinds, "search", search, what)
    add_several(parser, "--pages", int, default=[500, 2000, 10000], help="index sizes to time")
    parser.add_argument("--out", help="results folder (default: results/<preset>/bench_search)")
    rollout_text = "time rollouts against stock TRL's over the same environment, and compare the tokens"
    update_text = "time one GRPO update against stock TRL's on the same trajectories, and compare loss and gradient"
    for name, what in (("rollout", rollout_text), ("update", update_text)):
        parser = add_command(kinds, name, against_trl, what)
        parser.add_argument("--model", help="checkpoint (default: the shipped one, or one of random weights)")
        parser.add_argument("--questions", type=int, default=4, help="questions of MiniDocs (default: %(default)s)")
        parser.add_argument("--group", type=int, default=4, help="trajectories per question (default: %(default)s)")
        parser.add_argument("--repeats", type=int, default=3, help="turns that are counted (default: %(default)s)")
        parser.add_argument("--seed", type=int, help="seed of weights and trajectories (default: the preset's)")
        parser.add_argument("--out", help=f"results folder (default: results/<preset>/bench_{name})")


def _scale_model(commands) -> None:
    def prepare(arguments, config: Config, name: str, kind: str) -> tuple[Path, Path, Path]:
        """Where the model, its training checkpoints and its curves go; the same call goes on after a kill. The number
        of threads is part of what makes a run repeatable."""
        import torch

        torch.set_num_threads(arguments.threads)
        work = cache_dir() / "scale_model" / name
        return Path(arguments.out or work / f"final-{name}"), work, config.folder("scale_model") / kind

    def policy(arguments) -> None:
        from vrag_lib.scale_make import make_policy
        from vrag_lib.scale_training import PolicyTraining

        config = read_config(arguments)
        recipe = PolicyTraining(seed=config.seed, minidocs=config.minidocs)
        out, work, results = prepare(arguments, config, recipe.name, recipe.name)
        if arguments.recipe == "large":
            recipe = recipe.large()
        elif arguments.hours:
            recipe = recipe.of_hours(arguments.hours)
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

        config = read_config(arguments)
        out, work, results = prepare(arguments, config, "colqwen2", "retriever")
        train_retriever(out, arguments.hours, config.seed, work_dir=work, curves_dir=results)
        summary = evaluate_retriever(out, results, "test", config.minidocs, engine="native", dtype="float32")
        draw_curves(results)
        (out / "README.md").write_text(model_card(summary, arguments.hours, config.seed), encoding="utf-8")
        print(f"model  {out}\ncurves and evaluation  {results}")

    def report(arguments) -> None:
        from vrag_lib.factory import SCALE_RETRIEVER, scale_policy
        from vrag_lib.minidocs import MiniDocs
        from vrag_lib.minidocs_report import report
        from vrag_lib.scale_retriever_evaluation import evaluate_retriever
        from vrag_lib.scale_training import PolicyTraining

        config = read_config(arguments)
        measured, out = config.folder("scale_model"), config.folder("minidocs")
        found = measured / "retriever" / "test.json"
        if not found.is_file() and SCALE_RETRIEVER.is_dir():  # the shipped one, on documents of other settings
            evaluate_retriever(SCALE_RETRIEVER, found.parent, "test", config.minidocs, engine="native", dtype="float32")
        probes = measured / PolicyTraining(minidocs=config.minidocs).name / "perception_probes.csv"
        report(arguments.policy or scale_policy(config) or "", found, probes, out, MiniDocs(config.minidocs))
        print((out / "README.md").read_text())

    models = commands.add_parser("scale-model", help="train the laptop's tiny models", description="Scale models.")
    kinds = models.add_subparsers(title="models", dest="model", required=True, metavar="MODEL")
    policy_text = "train the tiny Qwen2.5-VL to read MiniDocs pages, from nothing, and measure it on the test split"
    retriever_text = "train the tiny ColQwen2 to find MiniDocs pages, from nothing, and measure it on the test split"
    for name, run, what in (("policy", policy, policy_text), ("retriever", retriever, retriever_text)):
        parser = add_command(kinds, name, run, what)
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
    parser = add_command(
        kinds, "report", report, "measure on the test split what makes MiniDocs hard for the scale models"
    )
    parser.add_argument("--policy", help="folder of the scale policy (default: the preset's)")


def _reproduce(commands) -> None:
    def run(arguments) -> None:
        from vrag_lib.notebooks import repository, reproduce

        config = read_config(arguments)
        reproduce(config, arguments.overrides, force=arguments.force, save_outputs=arguments.save_outputs)
        where = repository() / config.folder("")
        print(f"done; look at {where}/ (figures, tables, trajectories) and {where}/notebooks/ (executed notebooks)")

    parser = add_command(commands, "reproduce", run, "run every notebook in order and write results/<preset>/")
    parser.add_argument(
        "--force", action="store_true", help="also run notebooks that are unchanged since their last run"
    )
    parser.add_argument("--save-outputs", action="store_true", help="keep the outputs in notebooks/ as well")


def _reproduce_paper(commands) -> None:
    def run(arguments) -> int:
        from vrag_lib.factory import require_device
        from vrag_lib.matrix import SEEDS, run_matrix, states
        from vrag_lib.report import write_report

        config = read_config(arguments, experiment=True)
        if arguments.list:
            for outcome in states(config, arguments.cells, arguments.seeds):
                print(f"{outcome.cell:20} seed {outcome.seed}  {outcome.state}  {outcome.error}".rstrip())
            return 0
        failed = []
        if not arguments.report_only:
            require_device("policy.device", config.policy.device)
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
        print(f"report  {write_report(config, max(arguments.seeds, SEEDS))}")
        return 1 if failed else 0

    what = "run the paper's experiments and the ablations in miniature, cell by cell, and write tables and figures"
    parser = add_command(commands, "reproduce-paper", run, what)
    add_several(parser, "--cells", metavar="NAME", help="only these (default: all; --list names them)")
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


COMMANDS = (
    _synthesize,
    _sft,
    _grpo,
    _merge,
    _evaluate,
    _minidocs,
    _bench,
    _scale_model,
    _reproduce,
    _reproduce_paper,
)
"""Each adds one command to the parser, in the order of `vrag --help`."""
