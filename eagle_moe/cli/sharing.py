"""`eagle-moe import`, `pull` and `release`: models and experts from elsewhere, and to others."""

from __future__ import annotations

import argparse
from pathlib import Path

import eagle_moe


def add_import(commands: argparse._SubParsersAction) -> None:
    """`eagle-moe import`."""
    importer = commands.add_parser(
        "import",
        help="make a model of this project from an official Eagle release",
        description="Make a model of this project from a folder of an official Eagle release "
        "(NVlabs/EAGLE), number for number the same.",
    )
    importer.add_argument("source", type=Path, metavar="SRC", help="the release's folder")
    importer.add_argument("target", type=Path, metavar="DST", help="a folder that is made")
    importer.add_argument(
        "--geometry", type=Path, metavar="FILE", help="YAML with sizes other than the published"
    )
    importer.add_argument(
        "--template", metavar="NAME", help="chat template; default: what the release was trained on"
    )
    importer.set_defaults(run=_import)


def add_pull(commands: argparse._SubParsersAction) -> None:
    """`eagle-moe pull`."""
    puller = commands.add_parser(
        "pull",
        help="get a released model or expert from the Hub, and check it against its records",
        description="Download a released model or expert from the Hub, without running any code of "
        "it, and check the hash of every part.",
    )
    puller.add_argument("repo", metavar="OWNER/NAME", help="the repository on the Hub")
    puller.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR", help="a folder that is made; default: NAME"
    )
    puller.add_argument("--revision", metavar="R", help="a branch, tag or commit; default: main")
    puller.set_defaults(run=_pull)


def add_release(commands: argparse._SubParsersAction) -> None:
    """`eagle-moe release`."""
    release = commands.add_parser(
        "release",
        help="make a folder for the Hub, check it, and upload it",
        description="Make one folder of a trained model or expert, hold it to its source in fresh "
        "processes, write its card, and say what a push would send. Uploads with --push only.",
    )
    release.add_argument("model", type=Path, metavar="DIR", help="a finished checkpoint's folder")
    release.add_argument("--to", required=True, metavar="OWNER/NAME", help="repository of the Hub")
    release.add_argument(
        "--out", type=Path, metavar="DIR", help="default: release-NAME beside the model"
    )
    release.add_argument("--card", type=Path, metavar="FILE", help="licence, authors, ... (YAML)")
    release.add_argument("--push", action="store_true", help="upload; without it: a dry run")
    release.add_argument("--public", action="store_true", help="for everybody; default: private")
    release.add_argument("--revision", metavar="BRANCH", help="default: main")
    release.add_argument("--tag", metavar="TAG", help="name the upload for good, such as v1.0")
    release.add_argument(
        "--scores",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="DIR",
        help="what `python -m eval.run` has left",
    )
    release.add_argument(
        "--experts-page", type=Path, metavar="DIR", help="what `python -m eval.experts` has left"
    )
    release.add_argument(
        "--accept-licence",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="publish although a part is under this licence",
    )
    release.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="largest weight file; default: 5GB"
    )
    release.add_argument("--device", default="cpu", help="where it is checked; default: cpu")
    release.set_defaults(run=_release)


def _import(arguments: argparse.Namespace) -> int:
    from eagle_moe.interop.commands import import_command

    return import_command(
        arguments.source, arguments.target, arguments.geometry, arguments.template
    )


def _pull(arguments: argparse.Namespace) -> int:
    from eagle_moe.hub.pull import pull_command

    return pull_command(arguments.repo, arguments.folder, arguments.revision)


def _release(arguments: argparse.Namespace) -> int:
    eagle_moe.register()
    from eagle_moe.hub.commands import release_command
    from eagle_moe.hub.release import ReleaseSettings

    settings = ReleaseSettings(
        model=arguments.model,
        to=arguments.to,
        out=arguments.out,
        push=arguments.push,
        public=arguments.public,
        revision=arguments.revision,
        tag=arguments.tag,
        scores=arguments.scores,
        experts_page=arguments.experts_page,
        accepted=arguments.accept_licence,
        card=arguments.card,
        shard_size=arguments.shard_size,
        device=arguments.device,
    )
    return release_command(settings)
