"""The command line. `reasoninterp --help` and everything that fails early import no torch.

Whatever a user can get wrong ends with one sentence on standard error and exit status 2; Ctrl-C ends with status
130, and the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from reasoninterp import cli_corpus, cli_locate, cli_repair
from reasoninterp.errors import UserError

PROMPTS = ("raw", "fewshot", "chat")
KINDS = ("gsm8k", "aqua", "svamp", "prontoqa", "vllm")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns errors into exit statuses."""
    # Before torch is imported: on small models a second, spinning thread costs more than it brings.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        status = cli.main(arguments, prog_name="reasoninterp", standalone_mode=False)
        if isinstance(status, int) and status:
            sys.exit(status)
    except UserError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except click.exceptions.Abort:
        click.echo("stopped; the same command goes on from here.", err=True)
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from here.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)


class Batch(click.ParamType):
    """`auto`, or how many rows go into one forward pass."""

    name = "auto|N"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        """`auto` is None."""
        if value is None or value == "auto":
            return None
        if not str(value).isdigit() or int(value) < 1:
            self.fail(f"{value!r} is neither 'auto' nor a whole number above 0.")
        return int(value)


class Memory(click.ParamType):
    """A size of memory: a number with or without a unit, such as `8GiB` or `500MB`."""

    name = "SIZE"
    units = {"": 1, "B": 1} | {
        f"{p}{b}": (1024 if b == "iB" else 1000) ** k for b in ("B", "iB") for k, p in enumerate("KMGT", 1)
    }

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        """Bytes."""
        if value is None or isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip(), re.IGNORECASE)
        known = {unit.lower(): size for unit, size in self.units.items()}
        n = int(float(found[1]) * known[found[2].lower()]) if found and found[2].lower() in known else 0
        if n < 1:
            self.fail(f"{value!r} is no size of memory such as 8GiB or 500MB.")
        return n


def reading_options(minds: bool = True, out: bool = True) -> Callable[[Any], Any]:
    """The options of everything that reads traces with minds (`out`: whether a directory must be given)."""
    options = [
        click.option("--format", "format_", help="gsm8k, boxed, chat, or a JSON file; default: the file's first line."),
        click.option(
            "--prompt", type=click.Choice(PROMPTS), default="raw", show_default=True, help="Chosen once for all."
        ),
        click.option(
            "--contrast",
            type=click.Choice(["propagated", "forced", "swap"]),
            default="propagated",
            show_default=True,
            help="What is changed in the chain for E, maps and ledger.",
        ),
        click.option(
            "--shots",
            type=click.IntRange(1),
            default=3,
            show_default=True,
            help="Worked examples in a few-shot prompt.",
        ),
        click.option(
            "--extract", default="auto", show_default=True, help="How an answer is found in what a mind wrote."
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Longest chain a mind may write.",
        ),
        click.option("--limit", type=click.IntRange(1), help="Only the first N traces."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--device", default="cpu", show_default=True),
        click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"])),
        click.option("--batch-size", type=Batch(), default="auto", show_default=True, help="Rows in a forward pass."),
        click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch."),
        click.option("--allow-pickle", is_flag=True, help="Read pickled weights, which can run code."),
        click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model."),
        click.option("--quiet", is_flag=True, help="No progress bars."),
    ]
    if minds:
        options = [
            click.option("--base", required=True, help="Directory or hub id of the base model."),
            click.option("--tuned", required=True, help="Directory, hub id or LoRA adapter of the tuned model."),
            click.option("--traces", required=True, help="JSON Lines file of traces."),
            click.option("--out", required=out, help="Directory of the run."),
            click.option(
                "--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes, each with a body."
            ),
            click.option(
                "--memory",
                type=Memory(),
                help="What a sweep may take beside the weights, as 8GiB; default: half of what is free.",
            ),
            *options,
        ]

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="reasoninterp")
def cli() -> None:
    """Did fine-tuning cut the chain of thought off from the answer, how much, and where?"""


@cli.command()
@reading_options()
@click.option("--second-prompt", type=click.Choice(["fewshot", "chat"]), help="Repeat the verdict under this prompt.")
@click.option("--everything", is_flag=True, help="Maps, ledger and grafts also where the base is not interpretable.")
@click.option("--plan", is_flag=True, help="Do twenty traces; print refusals, memory and time to come.")
def compare(second_prompt: str | None, everything: bool, plan: bool, out: str, **options: Any) -> None:
    """Compare a base and a tuned model and write a report."""
    spec = make_spec(options)
    from reasoninterp import compare as job

    if plan:
        for line in job.plan(spec, quiet=options["quiet"]):
            click.echo(line)
        return
    more = {"second_prompt": second_prompt, "everything": everything}
    run = job.compare(
        spec,
        out,
        quiet=options["quiet"],
        second_prompt=second_prompt,
        workers=options["workers"],
        everything=everything,
        arguments=more,
    )
    show(run.manifest["verdict"], job.summary([run], run.path / "report.html"))


def show(verdict: dict[str, Any], lines: list[str]) -> None:
    """Print a verdict's sentences and the summary."""
    for sentence in verdict["sentences"]:
        click.echo(sentence)
    for line in lines:
        click.echo(line)


def make_spec(options: dict[str, Any]) -> Any:
    """A `ContextSpec` from command-line options; checks what can be checked without torch."""
    traces = Path(options["traces"])
    if not traces.exists():
        raise UserError(f"--traces {traces}: no such file; give a JSON Lines file of traces.")
    if not traces.is_file():
        raise UserError(f"--traces {traces}: this is no file; give a JSON Lines file of traces.")
    set_threads(options["threads"])
    from reasoninterp.models.context import ContextSpec

    return ContextSpec(
        minds={"base": options["base"], "tuned": options["tuned"]},
        traces=str(traces),
        format=options["format_"],
        prompt=options["prompt"],
        shots=options["shots"],
        contrast=options["contrast"],
        extractor=options["extract"],
        max_new_tokens=options["max_new_tokens"],
        limit=options["limit"],
        seed=options["seed"],
        device=options["device"],
        dtype=options["dtype"],
        batch_size=options["batch_size"],
        memory_budget=options["memory"],
        allow_pickle=options["allow_pickle"],
        trust_remote_code=options["trust_remote_code"],
    )


def set_threads(n: int) -> None:
    """How many threads torch uses."""
    import torch

    torch.set_num_threads(n)


@cli.command()
@click.option("--out", default="runs/demo", show_default=True, help="Directory of the run.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--limit", type=click.IntRange(1), default=None, help="Only the first N traces.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(out: str, seed: int, limit: int | None, quiet: bool) -> None:
    """Train the embedded organisms (or take them from the cache) and compare three pairs of them."""
    set_threads(1)
    from reasoninterp.compare import summary
    from reasoninterp.demo import run_demo

    runs = run_demo(Path(out), seed=seed, limit=limit, quiet=quiet)
    for line in summary(runs, runs[0].path / "report.html"):
        click.echo(line)


@cli.group()
def organisms() -> None:
    """Small real models in which the truth is known."""


@organisms.command("make")
@click.option("--out", required=True, help="Where to save them, one Hugging Face directory each.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--only", multiple=True, help="Only these (repeat the option); what they need is made as well.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def organisms_make(out: str, seed: int, only: tuple[str, ...], quiet: bool) -> None:
    """Train and save the organisms; a trained one is taken from the cache."""
    from reasoninterp.organisms import RECIPES, make

    for name in only:
        if name not in RECIPES:
            raise UserError(f"--only {name}: no such organism; there are {', '.join(RECIPES)}.")
    set_threads(1)
    for report in make(Path(out), seed=seed, only=list(only) or None, progress=not quiet):
        click.echo(str(report))


@cli.group()
def traces() -> None:
    """Chains of thought as files."""


@traces.command("convert")
@click.option("--from", "kind", required=True, type=click.Choice(KINDS), help="What the file is.")
@click.argument("file")
@click.option("--out", required=True, help="JSON Lines file to write.")
@click.option(
    "--segment", "segmenter", help="How a text is cut into steps: lines, sentences, numbered, think, calculator."
)
@click.option(
    "--extract", "extractor", help="How the answer is found in a sampler's text (vllm): hash, boxed, letter, ..."
)
@click.option("--mind", help="Who wrote the chains (vllm).")
@click.option("--model", help="Whose solutions are read from GSM8K's file of model solutions.")
@click.option("--shuffle-options", is_flag=True, help="Put the options of multiple choice into another order (aqua).")
@click.option("--seed", type=int, default=0, show_default=True)
def traces_convert(kind: str, file: str, out: str, shuffle_options: bool, seed: int, **options: str | None) -> None:
    """Convert a data set's file (or a sampler's output) to traces; say what was made and what was refused."""
    from reasoninterp.jobs import convert_file

    given = {name: value for name, value in options.items() if value is not None}
    for line in convert_file(kind, Path(file), Path(out), shuffle=shuffle_options, seed=seed, **given):
        click.echo(line)


@traces.command("sample")
@click.option("--model", required=True, help="Directory or hub id of the model that writes.")
@click.option("--questions", required=True, help="JSON Lines file: traces, or objects with id and question.")
@click.option("--n", type=click.IntRange(1), default=1, show_default=True, help="Chains a question.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--out", required=True, help="JSON Lines file to write.")
@reading_options(minds=False)
def traces_sample(**options: Any) -> None:
    """Let a model write chains for questions."""
    if not Path(options["questions"]).is_file():
        raise UserError(f"--questions {options['questions']}: no such file; give a JSON Lines file.")
    set_threads(options["threads"])
    from reasoninterp.jobs import sample_file

    for line in sample_file(options):
        click.echo(line)


@cli.command()
def studies() -> None:
    """The studies that come with the kit, one line each."""
    from reasoninterp.studies import built_in

    for name, line in built_in().items():
        click.echo(f"{name:<14} {line}")
    click.echo("FILE.py        a study of your own: reasoninterp run FILE.py --help")


@cli.command()
@click.argument("run")
def report(run: str) -> None:
    """Render the report of a run again from its tables."""
    from reasoninterp.report import render
    from reasoninterp.runs import Run

    click.echo(str(render(Run.read(run))))


class StudyCommands(click.Group):
    """`run NAME` or `run FILE.py[:NAME]`: a command whose flags are the study's parameters."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The built-in studies."""
        from reasoninterp.studies import HOMES

        return list(HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """A command made from the study's parameters."""
        from reasoninterp.studies import study_named

        return study_command(study_named(cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names alone: their one line each is `reasoninterp studies`, which has to import them."""
        with formatter.section("Studies"):
            formatter.write_text(", ".join(self.list_commands(ctx)) + ", or FILE.py, or FILE.py:NAME")


@cli.command("run", cls=StudyCommands, subcommand_metavar="STUDY [OPTIONS]")
def run_group() -> None:
    """Run one study, its parameters as flags: `reasoninterp run STUDY --help` shows them."""


def study_command(cls: Any) -> click.Command:
    """The command of a study: the options of `compare`, then one flag a parameter."""
    names = [f.name for f in dataclasses.fields(cls)]

    @reading_options()
    def run_one(out: str, **options: Any) -> None:
        from reasoninterp.compare import open_run, run_with_needs, workers_of

        study = cls(**{name: options.pop(f"study_{name}") for name in names})
        spec = make_spec(options)
        context = spec.load(progress=not options["quiet"])
        run = open_run(context, spec, out, {"study": cls.name, "parameters": study.parameters()})
        try:
            executor = workers_of(spec, options["workers"])
            result = run_with_needs(study, context, run, quiet=options["quiet"], executor=executor)
        finally:
            run.close()
        for name, table in result.tables.items():
            click.echo(f"{name}\n{table.head(20).to_string(index=False)}")
        click.echo(f"{result.measured} cells measured, {result.reused} taken from the run; tables and figures in {out}")

    about, said = cls.explain()
    command = click.command(cls.name, help=about)(run_one)
    hints = typing.get_type_hints(cls)
    taken = {name for parameter in command.params for name in parameter.opts}
    for name in names:
        if f"--{name.replace('_', '-')}" in taken:
            raise UserError(f"study {cls.name}: its parameter {name!r} is also an option of every study; rename it.")
    for field in dataclasses.fields(cls):
        command.params.append(flag(field, hints[field.name], said.get(field.name)))
    return command


def flag(field: Any, hint: Any, said: str | None = None) -> click.Option:
    """A study's parameter as a command-line option.

    Args:
        field: of the study's dataclass.
        hint: its type.
        said: what the study's docstring says of it.
    """
    if isinstance(hint, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = (
        None if required else (field.default if field.default is not dataclasses.MISSING else field.default_factory())
    )
    name = f"--{field.name.replace('_', '-')}"
    common: dict[str, Any] = {"default": default, "required": required, "show_default": True}
    common["help"] = said and said[0].upper() + said[1:]
    if hint is bool:
        return click.Option([f"{name}/--no-{name[2:]}", f"study_{field.name}"], **common)
    if typing.get_origin(hint) is typing.Literal:
        return click.Option([name, f"study_{field.name}"], type=click.Choice(typing.get_args(hint)), **common)
    if typing.get_origin(hint) in (tuple, list):
        inner = typing.get_args(hint)[0]
        return click.Option([name, f"study_{field.name}"], type=inner, multiple=True, **common)
    return click.Option([name, f"study_{field.name}"], type=hint, **common)


cli_locate.add_to(cli, reading_options(out=False), make_spec)
cli_repair.add_to(cli, reading_options(), make_spec)
cli_corpus.add_to(cli)
