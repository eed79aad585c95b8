"""The command `repair`: give the Units that cut the path their base weights back, and save the repaired model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from reasoninterp.cli_locate import LEVELS


def add_to(group: click.Group, options: Callable[[Any], Any], make_spec: Callable[[dict[str, Any]], Any]) -> None:
    """Add the command to a group.

    Args:
        group: the commands.
        options: the decorator that adds the options of everything that reads traces with two minds.
        make_spec: makes a `ContextSpec` from them.
    """

    @group.command("repair")
    @options
    @click.option(
        "--unit", "units", multiple=True, help="A Unit to give back (repeat); default: the smallest restoring set."
    )
    @click.option(
        "--level",
        type=click.Choice(LEVELS),
        default="block",
        show_default=True,
        help="Where that set is searched, and random Units beside it are drawn.",
    )
    @click.option(
        "--alpha",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        help="Share of tuning's change that is kept on the Units.",
    )
    @click.option("--no-align", is_flag=True, help="Do not align the tuned model's gauge with the base's first.")
    def repair(units: tuple[str, ...], level: str, alpha: float, no_align: bool, out: str, **given: Any) -> None:
        """Give Units their base weights back and save the repaired model to --out."""
        spec = make_spec(given)
        from reasoninterp.severance.grafts.repair_command import repair_command

        for line in repair_command(spec, units, alpha, out, level=level, align=not no_align):
            click.echo(line)

    # One search, in which each step waits for the one before: there is nothing for a second process to do.
    repair.params = [p for p in repair.params if p.name != "workers"]
