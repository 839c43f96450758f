"""`eagle-moe chat`, `serve` and `web`: ask a model about images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import eagle_moe


def add_chat(commands: argparse._SubParsersAction) -> None:
    """`eagle-moe chat`."""
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
    _add_placement(chat)
    chat.set_defaults(run=_chat)


def add_serve(commands: argparse._SubParsersAction) -> None:
    """`eagle-moe serve`."""
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


def add_web(commands: argparse._SubParsersAction) -> None:
    """`eagle-moe web`."""
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
    command.add_argument(
        "--quantize",
        choices=["int8", "nf4"],
        help="the language model in 8 or 4 bits, experts and connector as they are; needs the "
        "extra `quant`",
    )


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
        quantize=arguments.quantize,
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
        quantize=arguments.quantize,
        examples=arguments.examples,
        reference=arguments.reference,
        reference_count=arguments.reference_count,
        max_new_tokens=arguments.max_new_tokens,
        limits=tuple(arguments.limit),
    )
    eagle_moe.register()
    return web_command(settings)
