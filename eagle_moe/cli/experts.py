"""`eagle-moe experts list` and `experts check`."""

from __future__ import annotations

import argparse


def add_experts(commands: argparse._SubParsersAction) -> None:
    """The commands about experts."""
    experts = commands.add_parser("experts", help="list and check vision experts")
    actions = experts.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="every expert with view, map, size and licence")
    listing.set_defaults(run=_list_experts)
    check = actions.add_parser(
        "check",
        help="build experts with random weights and test what they promise",
        description="Build experts with random weights and test what they promise.",
    )
    check.add_argument(
        "names",
        nargs="*",
        metavar="NAME | KEY=VALUE",
        help="presets, timm:<model> or open_clip:<model>, and overrides such as view.size=64; "
        "without a name: every tiny preset",
    )
    check.set_defaults(run=_check_experts)


def _list_experts(arguments: argparse.Namespace) -> int:
    from eagle_moe.experts.commands import list_command

    return list_command()


def _check_experts(arguments: argparse.Namespace) -> int:
    from eagle_moe.experts.commands import check_command

    return check_command(arguments.names)
