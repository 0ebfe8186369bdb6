"""Generate text with a bundle's device half, alone or with its server.

Text streams to stdout, statistics go to stderr; with --json one object is printed instead. Ctrl-C ends the
generation cleanly and keeps what was generated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.edge.handover import HandOver
    from ..runtime.edge.model import EdgeModel
    from ..runtime.edge.stream import Generation
    from ..runtime.wire.security import ChannelSecurity


ACCEPT_DISTANCE = 0.2  # of --accept relaxed


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Declare how the server is reached, for every command that has one."""
    parser.add_argument(
        "--server",
        action="append",
        metavar="HOST:PORT",
        help="the server half's address; needed if the model is split; repeatable: the next is taken when one is lost",
    )
    parser.add_argument(
        "--on-server-loss",
        choices=("wait", "replay", "local", "fail"),
        help="replay: make the session again, there or at the next address, with the same text; wait: the same with "
        "more patience; local: go on until there is a server again, with the device's own copy of all layers, or with "
        "--exit-agreement with its draft; fail: give up (default: local with such a copy, else replay)",
    )
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument("--tls-ca", metavar="FILE", help="certificate (authority) to trust instead of the system's")
    trust.add_argument("--insecure", action="store_true", help="plaintext, for trusted links only")
    parser.add_argument("--cert", metavar="FILE", help="this device's certificate, where the server asks for one")
    parser.add_argument("--key", metavar="FILE", help="its key")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="this device's token, where the server asks for one (default: the environment's ISTHMUS_TOKEN)",
    )
    parser.add_argument(
        "--codec",
        metavar="NAME",
        help="raw32, raw16, tabq, tabq-rans or klt (default: klt if export calibrated it, else tabq; where the whole "
        "model is on the server, ids)",
    )
    parser.add_argument("--level", type=int, metavar="N", help="of the codec, from 0, the finest (default 2)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the processors at hand, at most 4")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="most positions, prompt included (default: the bundle's)",
    )
    parser.add_argument(
        "--memory-limit", metavar="SIZE", help="such as 300MB: refuse what does not fit, and enforce it"
    )


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """Declare how tokens are drafted, for the commands that generate over a link."""
    parser.add_argument(
        "--draft",
        choices=("auto", "off", "chain", "tree", "ngram"),
        help="guess tokens, so that several cross in one round trip; the text stays the same. chain: by the bundle's "
        "trained draft; tree: the same with more than one guess a position; ngram: by what stood in the text before; "
        "auto (default): all, as far as they pay",
    )
    parser.add_argument("--draft-length", type=int, metavar="N", help="most guesses at once (default: as many as pay)")
    parser.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="guess on while the answer is on its way (default)",
    )
    parser.add_argument(
        "--exit-agreement",
        type=float,
        metavar="P",
        help="early exit: where the trained draft is sure enough, take its token and do not ask the server. The text "
        "is no longer exactly the full model's: at least this share of its tokens, as in 0.95, is what the full model "
        "would have chosen after the same ones, on text like the calibration's; greedy and undrafted. With --deadline "
        "only where the answer is late, and 0 takes the draft's token then however unsure it is",
    )
    parser.add_argument(
        "--skip-schedule",
        metavar="MOST:LEAST:TOKENS",
        help="skip decoding: of a model's 30 layers, 30:24:128 runs all for the first generated token and ever fewer, "
        "24 from the 128th on; the prompt runs through all. The text is no longer the full model's, and soon a worse "
        "one. For bundles of small blocks (export --layers-per-block 2)",
    )
    parser.add_argument(
        "--ffn-skip",
        type=float,
        metavar="COSINE",
        help="where a generated token's hidden states before and after a feed-forward network have at least this "
        "cosine, as in 0.98, leave the next one out. The text is no longer the full model's. For bundles exported with "
        "--ffn-skip",
    )
    parser.add_argument(
        "--accept",
        choices=("exact", "relaxed"),
        default="exact",
        help="relaxed: the server takes guesses that come close to what it would choose, so that the text is no longer "
        "exactly the model's (default exact)",
    )
    parser.add_argument(
        "--accept-distance",
        type=float,
        metavar="X",
        help=f"with --accept relaxed: at most this share of tokens is another one for it; greedy: guesses at least 1 - "
        f"X times as probable as the best (default {ACCEPT_DISTANCE})",
    )


def accept_distance(args: argparse.Namespace) -> float:
    """By the options of `add_draft_options`, see `Sampling`."""
    from ..errors import RequestError

    if args.accept == "relaxed":
        return ACCEPT_DISTANCE if args.accept_distance is None else float(args.accept_distance)
    if args.accept_distance is not None:
        raise RequestError("--accept-distance needs --accept relaxed: an exact text has no distance")
    return 0.0


def channel_security(args: argparse.Namespace) -> ChannelSecurity:
    """How the server is reached, by the options of `add_server_options`."""
    from pathlib import Path

    from ..runtime.wire.security import ChannelSecurity
    from ..runtime.wire.tokens import ENVIRONMENT, checked_token, read_token

    token = None
    if args.token_file:
        token = read_token(args.token_file)
    elif ENVIRONMENT in os.environ:
        token = checked_token(os.environ[ENVIRONMENT], f"the environment's {ENVIRONMENT}")
    return ChannelSecurity(
        insecure=args.insecure,
        ca_file=Path(args.tls_ca) if args.tls_ca else None,
        cert_file=Path(args.cert) if args.cert else None,
        key_file=Path(args.key) if args.key else None,
        token=token,
    )


def open_model(args: argparse.Namespace, deadline_ms: float | None = None) -> EdgeModel:
    """Open the device half with the options of `add_server_options`, and a deadline for each token."""
    from ..devices.budget import parse_megabytes
    from ..devices.limits import enforce_memory_limit
    from ..runtime.edge.model import EdgeModel
    from ..runtime.skipping import SkipSchedule

    limit_mb = parse_megabytes(args.memory_limit) if args.memory_limit else None
    if limit_mb is not None:
        enforce_memory_limit(limit_mb)
    return EdgeModel(
        args.bundle,
        server=",".join(args.server) if args.server else None,
        security=channel_security(args),
        codec=args.codec,
        level=args.level,
        deadline_ms=deadline_ms,
        threads=args.threads,
        context=args.context,
        memory_limit_mb=limit_mb,
        draft=args.draft or "auto",
        draft_length=args.draft_length,
        overlap=args.overlap,
        on_server_loss=args.on_server_loss,
        exit_agreement=args.exit_agreement,
        skip_schedule=SkipSchedule.parse(args.skip_schedule) if args.skip_schedule else None,
        ffn_skip=args.ffn_skip,
    )


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="DIR", help="OUT/device")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="what the model continues, or answers with --chat")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids in place of text")
    prompt.add_argument(
        "--noise-of",
        metavar="RUN.json",
        help="generate again what --json printed there: the same prompt, sampling and noise, with --replace",
    )
    parser.add_argument(
        "--replace",
        action="append",
        default=[],
        metavar="POS=TOKEN",
        help="with --noise-of: this token id at this place of the generated text, from 0; repeatable",
    )
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument(
        "-n", "--max-new-tokens", type=int, default=256, metavar="N", help="default 256; the context may end it sooner"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 (default) is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="0 (default): off")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="1 (default): off")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="X", help="0 (default): off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 (default): off")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed (default 0) gives the same text"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    parser.add_argument(
        "--deadline",
        metavar="TIME",
        help="for each token but the first, as in 200ms: the codec's level, and then the number of drafts, follow link "
        "and server to keep it; with --exit-agreement the draft's token is taken where the answer is late",
    )
    parser.add_argument(
        "--plan",
        metavar="FILE",
        help="take codec, level, drafts, context and deadline from `isthmus plan -o FILE`",
    )
    parser.add_argument(
        "--hand-over-at",
        type=int,
        metavar="W",
        help="begin on the device alone and move to the server in the middle of token W, the prompt's counted; for a "
        "bundle exported with --device-layers all",
    )
    parser.add_argument(
        "--send",
        choices=("kv", "hidden"),
        help="what the server gets then: its layers' KV cache, or the hidden states at the split, usually much less "
        "(default hidden)",
    )
    add_draft_options(parser)
    add_server_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, streaming."""
    from ..devices.link import parse_duration_s
    from ..errors import RequestError
    from ..runtime.sampling import Sampling
    from .main import INTERRUPTED

    if args.noise_of:
        return _regenerate(args)
    if args.replace:
        raise RequestError("--replace needs --noise-of RUN.json: it edits a text that was generated before")
    prompt = _prompt(args)
    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        accept_distance=accept_distance(args),
    )
    deadline_ms = None if args.deadline is None else 1e3 * parse_duration_s(args.deadline)
    if args.plan:
        deadline_ms = _follow_plan(args, deadline_ms)
    hand_over = _hand_over(args)
    model = open_model(args, deadline_ms)
    stream = model.stream(
        prompt, max_new_tokens=args.max_new_tokens, sampling=sampling, stop=args.stop, hand_over=hand_over
    )
    interrupted = False
    try:
        for piece in stream:
            if not args.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.close()
    result = stream.result
    if args.json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        print()
        print(_summary(result), file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _regenerate(args: argparse.Namespace) -> int:
    from ..errors import RequestError
    from ..runtime.edge.counterfactual import read_run, regenerate

    for option in ("exit_agreement", "skip_schedule", "ffn_skip"):
        if getattr(args, option) is not None:
            option = "--" + option.replace("_", "-")
            raise RequestError(f"{option} with --noise-of: a run is repeated by the full model; leave {option} out")
    replace: dict[int, int] = {}
    for text in args.replace:
        position, _, token = text.partition("=")
        try:
            replace[int(position)] = int(token)
        except ValueError:
            raise RequestError(f"--replace {text!r}: must be a position and a token id, as in 12=345") from None
    run = read_run(args.noise_of)
    result = regenerate(open_model(args), run, replace, max_new_tokens=args.max_new_tokens)
    if args.json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        print(result.text)
        print(_summary(result), file=sys.stderr)
    return 0


def _follow_plan(args: argparse.Namespace, deadline_ms: float | None) -> float | None:
    """Fill options that were not given from a plan for this bundle; the deadline in ms."""
    from ..errors import PlanError
    from ..export.plan import read_plan
    from ..quant.codec import UNLEVELED
    from ..runtime.bundle import open_bundle
    from ..runtime.draft_bundle import open_draft

    plan = read_plan(args.plan)
    bundle = open_bundle(args.bundle, "device", verify=False, use_installed=False)
    plan.check_bundle(bundle.manifest)
    chosen = plan.chosen
    if args.codec is None and chosen.codec != "none":
        args.codec, args.level = chosen.codec, None if chosen.level < 0 else chosen.level
    args.context = plan.context if args.context is None else args.context
    if chosen.hand_over_at and args.hand_over_at is None:
        args.hand_over_at, args.send = chosen.hand_over_at, args.send or chosen.send
    if chosen.mode == "split" and args.draft is None:
        if not chosen.draft_length:
            args.draft = "off"
        elif open_draft(bundle, verify=False) is None:
            raise PlanError(
                f"the plan drafts {chosen.draft_length} tokens, this bundle has no trained draft; export it without "
                "--no-draft, or give --draft"
            )
        if args.draft_length is None:
            args.draft_length = chosen.draft_length or None
    has_levels = args.codec is not None and args.codec not in UNLEVELED
    return plan.deadline_ms if deadline_ms is None and has_levels else deadline_ms


def _hand_over(args: argparse.Namespace) -> HandOver | None:
    from ..errors import RequestError
    from ..runtime.edge.handover import HandOver

    if args.hand_over_at is not None:
        return HandOver(args.hand_over_at, args.send or "hidden")
    if args.send:
        raise RequestError(f"--send {args.send} needs --hand-over-at: without it nothing is handed over")
    return None


def _prompt(args: argparse.Namespace) -> str | list[int] | list[dict[str, str]]:
    from ..errors import RequestError

    if args.prompt_ids is not None:
        if args.chat:
            raise RequestError("--chat needs a text prompt: give it with -p, or leave --chat out")
        try:
            return [int(part) for part in args.prompt_ids.split(",") if part.strip()]
        except ValueError:
            raise RequestError(f"--prompt-ids {args.prompt_ids!r}: must be numbers with commas, as in 1,2,3") from None
    if not args.chat:
        if args.system:
            raise RequestError("--system needs --chat: a plain prompt has no system message")
        return str(args.prompt)
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": args.prompt}]


def _summary(result: Generation) -> str:
    line = (
        f"[{result.prompt_tokens} + {result.new_tokens} tokens, {result.finish_reason}; first after "
        f"{result.ttft_ms:.0f} ms, then {result.decode_tokens_per_s:.1f} tokens/s"
    )
    if result.round_trips:
        line += f"; {result.codec}: {result.prefill_bytes_up / result.prompt_tokens:.0f} bytes up per prompt token"
        if result.new_tokens > 1:
            line += f", {result.decode_bytes_up / (result.new_tokens - 1):.0f} per new one"
        line += f"; {result.round_trips} round trips"
        if result.drafts.drafted:
            line += (
                f", {result.tokens_per_round_trip:.1f} tokens each: {result.drafts.accepted} of "
                f"{result.drafts.drafted} drafts accepted"
            )
        if result.exited:
            line += f"; {result.exited} tokens exited"
    if len({token.layers for token in result.tokens}) > 1:
        line += f"; {result.mean_layers:.1f} layers a token"
    if result.deadline_ms is not None:
        levels = Counter(token.level for token in result.tokens if token.level is not None)
        shares = ", ".join(f"{count} at level {level}" for level, count in sorted(levels.items()))
        line += (
            f"; deadline {result.deadline_ms:g} ms: {result.late_tokens} of {max(0, result.new_tokens - 1)} late; "
            f"{shares}; {len(result.level_changes)} changes"
        )
        if result.drafts.drafted and result.least_drafts is not None:
            line += f", at times at most {result.least_drafts} drafts on the way"
    for replay in result.replays:
        line += (
            f"; made again at {replay.address}, token {replay.token}: {replay.steps} steps in {replay.seconds:.2f} s"
        )
    for move in result.moves:
        if move.to == "server":
            line += f"; handed over at token {move.token}: {move.bytes_up} bytes ({move.send}), {move.seconds:.2f} s"
        else:
            line += f"; back on the device at token {move.token}, {move.positions} run again in {move.seconds:.2f} s"
    return line + "]"
