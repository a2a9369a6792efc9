"""The `igrpo` command. Handlers import what they need themselves, so that each command starts fast."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.errors import LaunchError

SINGLE_SERVICES = {
    "rollout-server": "serve the model with SGLang",
    "verifier": "grade answers",
    "orchestrator": "conduct a run over services that run elsewhere",
    "trainer": "train with DeepSpeed (starts torchrun for more than one process)",
}


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser(prog="igrpo", description="iGRPO: draft, choose the best draft, refine, train.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    def with_config(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("config", type=Path, metavar="CONFIG", help="YAML file with a section per service")
        return sub

    train = with_config(command("train", "run all services on this machine, supervised"))
    train.add_argument("--dry-run", action="store_true", help="check everything and print the plan; start nothing")
    _overrides(train)
    for name, text in SINGLE_SERVICES.items():
        single = with_config(command(name, text))
        if name == "rollout-server":
            single.add_argument("--index", type=int, default=0, help="number of this replica, from 0")
            single.add_argument("--alone", action="store_true", help="serve without registering with an orchestrator")
        _overrides(single)
    evaluate = with_config(command("eval", "measure single-shot pass@1, avg@k and pass@k of MODEL on the held-out set"))
    evaluate.add_argument("model", metavar="MODEL", help="model folder or hub name, such as runs/NAME/export")
    _overrides(evaluate)
    plot = command("plot", "draw RUN/accuracy.png from RUN/metrics.jsonl")
    plot.add_argument("run", type=Path, metavar="RUN", help="run folder")
    command("config-reference", "print the configuration reference (docs/configuration.md)")
    measure = with_config(commands.add_parser("_measure"))  # the leading child of `eval`
    _overrides(measure)
    return top


def _overrides(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="replaces a value of the file")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 success, 1 failure, 2 unusable configuration, 128 + n ended by signal n."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]:
        top.error(f"unknown argument: {unknown[0]}")
    if rest:  # overrides after an option
        args.overrides = [*args.overrides, *rest]
    try:
        return _dispatch(args)
    except LaunchError as error:
        for line in str(error).splitlines():
            print(f"igrpo: {line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; nor may the exit try
        return 1


def _dispatch(args: argparse.Namespace) -> int:
    match args.command:
        case "train":
            from launch.train import train

            return train(args.config, args.overrides, dry_run=args.dry_run)
        case "eval":
            from launch.evaluate import evaluate_model

            return evaluate_model(args.config, args.model, args.overrides)
        case "_measure":
            from launch.evaluate import measure

            return measure(args.config, args.overrides)
        case "plot":
            from launch.plot import plot_accuracy

            print(plot_accuracy(args.run))
            return 0
        case "config-reference":
            from launch.reference import render

            sys.stdout.write(render())
            return 0
        case service:
            return _service(service, args)


def _service(service: str, args: argparse.Namespace) -> int:
    from launch.config import load
    from launch.resolve import resolve
    from launch.services import run_service

    arguments = [str(args.config), *args.overrides]
    config = resolve(load(args.config, args.overrides))
    if service == "rollout-server":
        return run_service(service, config, arguments, index=args.index, alone=args.alone)
    return run_service(service, config, arguments)


if __name__ == "__main__":
    sys.exit(main())
