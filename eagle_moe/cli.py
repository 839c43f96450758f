"""`eagle-moe`: the commands for people who use models. Everything heavy is imported when needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import eagle_moe


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Mistakes of the person end in one line, code 2."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eagle-moe", description="Vision-language models with a mixture of vision experts."
    )
    parser.add_argument("--version", action="version", version=f"eagle-moe {eagle_moe.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_experts(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_web(commands)
    _add_import(commands)
    _add_pull(commands)
    _add_release(commands)
    doctor = commands.add_parser("doctor", help="show versions and what is missing, and why")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_experts(commands: argparse._SubParsersAction) -> None:
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


def _add_chat(commands: argparse._SubParsersAction) -> None:
    chat = commands.add_parser("chat", help="ask a model about images")
    chat.add_argument("--model", required=True, metavar="DIR", help="a checkpoint's folder")
    chat.add_argument(
        "--image",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="images for the first question",
    )
    chat.add_argument("--prompt", metavar="TEXT", help="ask this only, and leave")
    chat.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default: 512")
    chat.add_argument(
        "--quantize",
        choices=["int8", "nf4"],
        help="the language model in 8 or 4 bits, experts and connector as they are; needs the "
        "extra `quant`",
    )
    _add_placement(chat)
    chat.set_defaults(run=_chat)


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser(
        "serve",
        help="answer chat completions over HTTP, as OpenAI's clients ask for them",
        description="Answer /v1/chat/completions over HTTP, with images, whole or as a stream. "
        "Needs the extra `serve`.",
    )
    serve.add_argument("model", type=Path, metavar="DIR", help="a checkpoint's folder")
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    serve.add_argument("--name", help="what clients call the model; default: the folder's name")
    serve.add_argument(
        "--max-new-tokens", type=int, default=1024, metavar="N", help="of an answer; default: 1024"
    )
    serve.add_argument(
        "--queue", type=int, default=32, metavar="N", help="requests that may wait; default: 32"
    )
    serve.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="requests may name its files, as file:NAME"
    )
    _add_limits(serve)
    _add_placement(serve)
    serve.set_defaults(run=_serve)


def _add_web(commands: argparse._SubParsersAction) -> None:
    web = commands.add_parser(
        "web",
        help="ask a model about images in a browser, with experts switched off",
        description="A page to ask a model about images, with and without some of its experts. "
        "Needs the extra `web`.",
    )
    web.add_argument("--model", required=True, type=Path, metavar="DIR", help="a checkpoint's")
    web.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    web.add_argument("--port", type=int, default=7860, help="default: 7860; 0: any free one")
    web.add_argument(
        "--examples", type=Path, metavar="DIR", help="a suite to take example questions from"
    )
    web.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="a suite, or a folder of images: a silenced expert gives the mean of its maps over "
        "them; default: the examples",
    )
    web.add_argument(
        "--reference-count", type=int, default=100, metavar="N", help="of its images; default: 100"
    )
    web.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="of an answer; default: 512"
    )
    _add_limits(web)
    _add_placement(web)
    web.set_defaults(run=_web)


def _add_limits(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--limit",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of one request: image_bytes, image_pixels, image_count, prompt_characters, "
        "request_bytes",
    )


def _add_placement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: best")
    command.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights; default: as saved",
    )


def _add_import(commands: argparse._SubParsersAction) -> None:
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


def _add_pull(commands: argparse._SubParsersAction) -> None:
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


def _add_release(commands: argparse._SubParsersAction) -> None:
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


def _list_experts(arguments: argparse.Namespace) -> int:
    from eagle_moe.experts.commands import list_command

    return list_command()


def _check_experts(arguments: argparse.Namespace) -> int:
    from eagle_moe.experts.commands import check_command

    return check_command(arguments.names)


def _chat(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {arguments.max_new_tokens}: must be at least 1.")
    eagle_moe.register()
    from transformers.utils.logging import disable_progress_bar

    from eagle_moe.chat.session import ChatSession
    from eagle_moe.chat.terminal import run_chat

    if not sys.stderr.isatty():
        disable_progress_bar()
    session = ChatSession.load(
        arguments.model, arguments.device, arguments.dtype, arguments.quantize
    )
    run_chat(session, arguments.image, arguments.prompt, arguments.max_new_tokens)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from eagle_moe.serving.launch import ServeSettings, serve_command

    settings = ServeSettings(
        model=arguments.model,
        host=arguments.host,
        port=arguments.port,
        device=arguments.device,
        dtype=arguments.dtype,
        name=arguments.name,
        max_new_tokens=arguments.max_new_tokens,
        queue=arguments.queue,
        image_folder=arguments.image_folder,
        limits=tuple(arguments.limit),
    )
    eagle_moe.register()
    return serve_command(settings)


def _web(arguments: argparse.Namespace) -> int:
    from eagle_moe.web.server import WebSettings, web_command

    settings = WebSettings(
        model=arguments.model,
        host=arguments.host,
        port=arguments.port,
        device=arguments.device,
        dtype=arguments.dtype,
        examples=arguments.examples,
        reference=arguments.reference,
        reference_count=arguments.reference_count,
        max_new_tokens=arguments.max_new_tokens,
        limits=tuple(arguments.limit),
    )
    eagle_moe.register()
    return web_command(settings)


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


def _doctor(arguments: argparse.Namespace) -> int:
    from eagle_moe.doctor import run_doctor

    return run_doctor()


if __name__ == "__main__":
    sys.exit(main())
