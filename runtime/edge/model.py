"""The device runtime's public face: open a bundle, generate text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ...devices.backend import default_threads
from ...errors import RequestError
from ...quant.codec import Codec
from ..back import BackEngine
from ..bundle import open_bundle
from ..codecs import checked_level, default_codec, open_levels
from ..draft_bundle import open_draft
from ..memory import check_session, kept_bytes, process_limit_mb
from ..sampling import Sampling
from ..segments import AbsentEmbedding, Embedding, Head, LayerStack
from ..skipping import (
    FFN_WARM_UP,
    Bypass,
    SkipSchedule,
    bypass_order,
    checked_similarity,
    halves,
    running_layers,
)
from ..text import StopStrings, Tokenizer
from .controller import Controller, PacedCodec
from .draft_pace import DraftPace
from .drafting import MAX_DRAFTS, DraftedTokens
from .exiting import ExitTokens
from .generate import PREFILL_CHUNK, Back, LocalBack, Token, generate_tokens
from .handover import HandOver, MovingBack, OwnBack
from .options import DraftMode, OnServerLoss, check_exits, checked_draft, checked_policy, exit_threshold
from .stream import Generation, TextStream, TokenStream
from .timely import RESERVE_S, TimelyTokens
from .trained_draft import TrainedDraft
from .unsent_text import UnsentText

if TYPE_CHECKING:
    from ..wire.security import ChannelSecurity
    from .link import RemoteBack

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages ``{"role": …, "content": …}``."""


class EdgeModel:
    """A bundle's device half, opened, with its server's address if the model is split.

    One generation runs at a time. For example::

        model = EdgeModel.open("out/device", server="127.0.0.1:7070", tls_ca="cert.pem")
        for piece in model.stream("Once upon a time", max_new_tokens=64):
            print(piece, end="", flush=True)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        server: str | None = None,
        security: ChannelSecurity | None = None,
        codec: str | None = None,
        level: int | None = None,
        deadline_ms: float | None = None,
        threads: int | None = None,
        context: int | None = None,
        memory_limit_mb: float | None = None,
        draft: DraftMode = "auto",
        draft_length: int | None = None,
        overlap: bool = True,
        on_server_loss: OnServerLoss | None = None,
        exit_agreement: float | None = None,
        skip_schedule: SkipSchedule | None = None,
        ffn_skip: float | None = None,
    ) -> None:
        """Open ``OUT/device``; nothing is sent before the first generation.

        Args:
            folder: the device half of a bundle.
            server: ``HOST:PORT`` of the server half; needed exactly if the bundle is split. Where the device holds
                all layers nevertheless, it may stay away: then they all run here; with a server the model is split as
                usual, and goes on here if that is lost. Several addresses with commas between them are servers with the
                same half, for when one is full or lost.
            security: how to reach the server; by default TLS with the system's authorities.
            codec: what hidden states are sent in, one of the manifest's; by default ``klt`` if export calibrated it,
                else ``tabq``, and ``ids`` if the whole model is on the server.
            level: of that codec, from 0, the finest; see `isthmus.runtime.codecs.open_codec`.
            deadline_ms: time for each token but the first. The level is then only the first one: it changes from token
                to token, as the link and the server ask for; see `isthmus.runtime.edge.controller`.
            threads: of onnxruntime; by default the processors at hand, at most four.
            context: most positions of a generation, prompt included; by default all that the bundle was exported for.
            memory_limit_mb: refuse what would take more resident memory at its peak, before anything is loaded; by
                default what the machine, or the container, has free.
            draft: how tokens are guessed, so that several cross in one round trip; no guess changes the text.
                ``chain`` takes the bundle's trained draft, ``tree`` several guesses of it for each position (with
                overlap), ``ngram`` what stood in the text before, ``auto`` all as far as there are any and they pay,
                ``off`` none.
            draft_length: most guesses that wait for an answer; by default as many as pay, at most `MAX_DRAFTS`.
            overlap: whether the device guesses on while it waits.
            on_server_loss: ``replay`` makes a lost session again, on the same server or another one, from what was
                sent; ``wait`` does so, too, and has more patience; ``local`` goes on until there is a server again,
                with the device's own copy of the layers, or with exits with the draft alone; ``fail`` gives up. By
                default ``local`` if there is a copy, else ``replay``. No text depends on it, but for rounding in the
                codec where the device goes on with its copy; the draft alone writes a worse one.
            exit_agreement: the device takes the trained draft's token without asking the server where the draft is so
                sure that at least this share of all tokens is what the full model would have chosen after the same
                ones, by a calibration whose risk is `isthmus.runtime.exits.RISK`. The text is no longer exactly the
                full model's. Greedy, undrafted generations only. With a deadline a token is taken so only if the answer
                is late; 0 promises nothing, and takes it however unsure the draft is.
            skip_schedule: generated tokens leave blocks of layers out, on both sides, ever more of them as the text
                goes on. The text is no longer the full model's.
            ffn_skip: a generated token leaves out feed-forward networks, on both sides, behind one before and after
                which its hidden states have at least this cosine; for bundles exported with ``ffn_skip``. The text is
                no longer the full model's.

        Raises:
            BundleError: the folder is no intact device half.
            RequestError: a server is missing or not needed, the context is out of range, or a deadline cannot be kept
                by a codec's levels.
            CodecError: an unknown codec, or a level that it does not have.
            MemoryLimitError: weights, KV cache at full length and the rest do not fit.
        """
        self.threads = threads = default_threads() if threads is None else threads
        bundle = open_bundle(folder, "device")
        self.manifest = manifest = bundle.manifest
        if manifest.device_only == bool(server) and (server or not manifest.whole_on_device):
            raise RequestError(
                f"server={server!r}: this bundle runs wholly on the device; leave the server out"
                if server
                else f"no server given: layers {manifest.split}–{manifest.architecture.layers - 1} of this bundle run "
                "on one; start `isthmus serve` and give its address"
            )
        self.context = manifest.max_length if context is None else context
        if not 2 <= self.context <= manifest.max_length:
            raise RequestError(
                f"context={context}: must lie between 2 and {manifest.max_length}, for which this bundle was exported"
            )
        self._server, self._deadline_ms = server, deadline_ms
        exits = exit_agreement is not None
        self._on_server_loss = checked_policy(on_server_loss, manifest, exits=exits and deadline_ms is None)
        if draft_length is not None and not 1 <= draft_length <= MAX_DRAFTS:
            raise RequestError(f"draft length {draft_length}: must lie between 1 and {MAX_DRAFTS}")
        self._draft = self._drafting(draft)
        self._skip_schedule = skip_schedule
        self._ffn_skip = None if ffn_skip is None else checked_similarity(ffn_skip, manifest)
        self._bypass(1)  # a schedule that this bundle cannot keep is an error now
        trained = open_draft(bundle) if exits or self._draft in ("auto", "chain", "tree") else None
        if self._draft in ("chain", "tree") and trained is None:
            raise RequestError(
                f"draft={draft!r}: {bundle.folder} holds no trained draft; run `isthmus distill`, or choose ngram"
            )
        self._exit_threshold = None
        if exit_agreement is not None:
            skips = skip_schedule is not None or ffn_skip is not None
            check_exits(exit_agreement, manifest, server=bool(server), draft=self._draft, skips=skips)
            self._exit_threshold = exit_threshold(exit_agreement, bundle, trained, deadline=deadline_ms is not None)
        limit_mb = process_limit_mb(memory_limit_mb)
        codec = codec or default_codec(bundle)
        kept = kept_bytes(codec, manifest.architecture.d_model) if self._replays else 0
        check_session(bundle, self.context, chunk=PREFILL_CHUNK, limit_mb=limit_mb, draft=trained, kept_bytes=kept)
        self._levels = open_levels(bundle, codec)
        self._level = checked_level(self._levels, level)
        self._bundle, self._security = bundle, security
        self._controller()  # a deadline of no use is an error now
        self._draft_length = MAX_DRAFTS if draft_length is None else draft_length
        self._overlap = overlap
        self._pace = DraftPace()
        self._told_old = False
        self.manifest_sha256 = bundle.manifest_sha256
        self.tokenizer = Tokenizer.from_file(
            bundle.path("tokenizer.json"),
            manifest.chat_template,
            manifest.special_tokens,
            manifest.end_tokens,
        )
        self._embedding = AbsentEmbedding(bundle) if manifest.server_only else Embedding(bundle)
        self._stack = LayerStack(bundle, threads)
        self._head = Head(bundle, threads) if manifest.device_only else None
        self._trained = TrainedDraft(trained, threads) if trained is not None else None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        server: str | None = None,
        tls_ca: str | Path | None = None,
        insecure: bool = False,
        codec: str | None = None,
        level: int | None = None,
        deadline_ms: float | None = None,
        threads: int | None = None,
        context: int | None = None,
        memory_limit_mb: float | None = None,
        draft: DraftMode = "auto",
    ) -> EdgeModel:
        """Open ``OUT/device`` with the options that most apps need; see the class for the rest."""
        from ..wire.security import ChannelSecurity

        security = ChannelSecurity(ca_file=Path(tls_ca) if tls_ca else None, insecure=insecure)
        return cls(
            folder,
            server=server,
            security=security,
            codec=codec,
            level=level,
            deadline_ms=deadline_ms,
            threads=threads,
            context=context,
            memory_limit_mb=memory_limit_mb,
            draft=draft,
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        hand_over: HandOver | None = None,
        draft: DraftMode | None = None,
    ) -> TextStream:
        """Begin a generation and return its text as a stream.

        Args:
            prompt: a text, token ids, or chat messages ``{"role": …, "content": …}``.
            max_new_tokens: at most that many tokens; the context may end it sooner.
            sampling: greedy by default.
            stop: strings that end the text and are not part of it.
            hand_over: begin on the device alone, and move to the server there; needs a bundle that was exported with
                all layers for the device, and a server.
            draft: in place of the model's own; ``off`` leaves exits out, too.

        Raises:
            RequestError: the prompt is empty, too long or holds ids outside the vocabulary; or there can be no
                hand-over.
            LinkError: the server cannot be reached or refuses the session.
        """
        stop_strings = StopStrings(stop)
        tokens = self.tokens(prompt, max_new_tokens=max_new_tokens, sampling=sampling, hand_over=hand_over, draft=draft)
        return TextStream(tokens, self.tokenizer, stop_strings)

    def tokens(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        end_tokens: Sequence[int] | None = None,
        hand_over: HandOver | None = None,
        draft: DraftMode | None = None,
    ) -> TokenStream:
        """Begin a generation and return its tokens, below text; the caller closes the stream.

        Args:
            prompt: see `stream`.
            max_new_tokens: see `stream`.
            sampling: see `stream`.
            end_tokens: ids that end it; by default the bundle's.
            hand_over: see `stream`.
            draft: see `stream`.

        Raises:
            RequestError: see `stream`.
            LinkError: see `stream`.
        """
        started = perf_counter()
        sampling = sampling or Sampling()
        ids = self.prompt_ids(prompt)
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        max_new_tokens = min(max_new_tokens, self.context - len(ids))
        capacity = len(ids) + max_new_tokens
        bypass = self._bypass(len(ids))
        front_bypass, back_bypass = halves(bypass, self.manifest.split)
        # First: if memory is short here, no session is left on the server.
        front = self._stack.session(capacity, front_bypass)
        mode = self._draft if draft is None else self._drafting(draft)
        if mode == "chain" and self._trained is None:
            raise RequestError(
                "draft='chain': the model was opened without a trained draft; open it with chain or auto"
            )
        exits = self._exit_threshold is not None and draft != "off"
        if exits and hand_over is not None:
            raise RequestError("an exit agreement and a hand-over: leave one of them out")
        if exits and (sampling.temperature or sampling.repetition_penalty != 1.0):
            raise RequestError(
                "an exit agreement is calibrated for greedy tokens: leave temperature and repetition penalty out"
            )
        trained = None
        if self._trained is not None and (exits or mode in ("auto", "chain", "tree")):
            trained = self._trained.session(capacity, sampling, ids)
        controller = self._controller()
        codec = self._levels[self._level] if controller is None else PacedCodec(self._levels, controller)
        back = self._back(codec, hand_over)
        back.open(capacity, sampling, ids if sampling.repetition_penalty != 1.0 else (), back_bypass)
        layers = self.manifest.architecture.layers
        bounds: Any = {
            "max_new_tokens": max_new_tokens,
            "end_tokens": self.manifest.end_tokens if end_tokens is None else end_tokens,
        }
        drafts = None
        threshold = self._exit_threshold if exits else None
        if threshold is not None and trained is not None and (controller is None or self._verifies(back)):
            remote = cast("RemoteBack", back)
            alone = self._on_server_loss == "local"
            limit = remote.chunk_limit()
            text = UnsentText(self._embedding, front, trained, ids, chunk_limit=limit, keeps=alone, **bounds)
            depths: Any = {"threshold": threshold, "split": self.manifest.split, "layers": layers}
            if controller is None:
                tokens = iter(ExitTokens(text, remote, alone=alone, **depths))
            else:
                tokens = iter(TimelyTokens(text, remote, controller=controller, **depths))
        elif mode != "off" and hand_over is None and self._verifies(back):
            drafted = DraftedTokens(
                self._embedding,
                front,
                cast("RemoteBack", back),
                ids,
                trained=trained,
                ngrams=mode in ("auto", "ngram"),
                branches=mode in ("auto", "tree"),
                pace=self._pace,
                length=self._draft_length,
                overlap=self._overlap,
                controller=controller,
                layers=layers,
                **bounds,
            )
            tokens, drafts = iter(drafted), drafted.counts
        else:
            tokens = generate_tokens(self._embedding, front, back, ids, controller=controller, layers=layers, **bounds)
        if isinstance(back, MovingBack):
            tokens = back.watched(tokens)
        if bypass.blocks:
            tokens = self._with_depth(tokens, bypass, len(ids))
        return TokenStream(
            tokens,
            back,
            prompt_ids=ids,
            sampling=sampling,
            manifest_sha256=self.manifest_sha256,
            codec=codec.name if self._server else "none",
            started=started,
            controller=controller,
            drafts=drafts,
            skip_schedule=self._skip_schedule,
            ffn_skip=self._ffn_skip,
        )

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        hand_over: HandOver | None = None,
        draft: DraftMode | None = None,
    ) -> Generation:
        """Generate to the end; see `stream` for arguments and errors."""
        stream = self.stream(
            prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, hand_over=hand_over, draft=draft
        )
        for _ in stream:
            pass
        return stream.result

    def prompt_ids(self, prompt: Prompt, *, new_tokens: int = 1) -> list[int]:
        """Token ids of a prompt in any of its forms, checked against the context and the vocabulary.

        Args:
            prompt: see `stream`.
            new_tokens: positions of the context that must be left after it.

        Raises:
            RequestError: empty, too long for the context, or ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.encode_chat(cast("Sequence[Mapping[str, str]]", prompt))
        else:
            ids = [int(token) for token in cast("Sequence[int]", prompt)]
        vocabulary = self.manifest.architecture.vocab_size
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
        for token in ids:
            if not 0 <= token < vocabulary:
                raise RequestError(f"token id {token}: must lie between 0 and {vocabulary - 1}")
        if len(ids) + new_tokens > self.context:
            larger = "--context" if self.context < self.manifest.max_length else "--max-length of the export"
            raise RequestError(
                f"the prompt has {len(ids)} tokens: the context holds {self.context}, new tokens included; shorten it "
                f"or choose a larger {larger}"
            )
        return ids

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits ``[tokens, vocab_size]`` after each position of a text; the whole model must be on the device.

        Raises:
            RequestError: the bundle is split, or the ids do not fit.
        """
        if self._head is None:
            raise RequestError("score needs the whole model on the device, in one half: export with `--split all`")
        ids = self.prompt_ids(token_ids, new_tokens=0)
        front = self._stack.session(len(ids))
        chunks = [
            self._head.logits_many(front.forward(self._embedding.rows(ids[first : first + PREFILL_CHUNK])))
            for first in range(0, len(ids), PREFILL_CHUNK)
        ]
        return np.concatenate(chunks)

    def _controller(self) -> Controller | None:
        """What keeps the deadline in one generation, if there is one."""
        if self._deadline_ms is None:
            return None
        if not self._server or self.manifest.server_only:
            raise RequestError(
                "a deadline needs a split bundle and its server: no hidden states cross a link here; leave it out"
            )
        if len(self._levels) == 1:
            raise RequestError(
                f"a deadline needs a codec with levels: {self._levels[0].name} has none; choose klt, tabq or tabq-rans"
            )
        reserve_s = RESERVE_S if self._exit_threshold is not None else 0.0
        return Controller(self._deadline_ms / 1e3, level=self._level, levels=len(self._levels), reserve_s=reserve_s)

    def _drafting(self, draft: DraftMode) -> DraftMode:
        return checked_draft(draft, self.manifest, server=bool(self._server))

    def _bypass(self, prompt_tokens: int) -> Bypass:
        """What a generation leaves out."""
        blocks: dict[int, int] = {}
        if self._skip_schedule is not None:
            layers = self.manifest.architecture.layers
            blocks = self._skip_schedule.blocks(bypass_order(self.manifest), layers, prompt_tokens)
        return Bypass(blocks, self._ffn_skip, max(prompt_tokens, FFN_WARM_UP))

    def _with_depth(self, tokens: Iterator[Token], bypass: Bypass, prompt_tokens: int) -> Iterator[Token]:
        """The tokens, with the number of layers that each went through."""
        for number, token in enumerate(tokens):
            position = prompt_tokens + number - 1  # of what it was chosen after
            yield token._replace(layers=running_layers(bypass, self.manifest, position))

    def _verifies(self, back: Back) -> bool:
        """Whether the server of an opened session takes drafts."""
        if cast("RemoteBack", back).verifies:
            return True
        if not self._told_old:
            logger.warning("%s is too old to verify drafts, a token takes a round trip; update it", self._server)
        self._told_old = True
        return False

    @property
    def _replays(self) -> bool:
        """Whether a session that is lost with its server is made again."""
        return bool(self._server) and self._on_server_loss in ("replay", "wait")

    @property
    def server(self) -> str | None:
        """Address of the server half; None if the device runs all layers itself."""
        return self._server

    @cached_property
    def _own_back(self) -> BackEngine:
        """The device's copy of the back, opened when it is first needed: most generations over a server never do."""
        return BackEngine(self._bundle.own_back(), self.threads)

    def _back(self, codec: Codec, hand_over: HandOver | None) -> Back:
        whole = self.manifest.whole_on_device and self._head is None
        if hand_over and not (whole and self._server):
            raise RequestError(
                "a hand-over needs a server and a bundle exported with `--split N --device-layers all`: "
                + ("give the server's address" if whole else "this one is not; leave the hand-over out")
            )
        if self._head is not None:
            return LocalBack(self._head)
        own = OwnBack(lambda: self._own_back)
        if not self._server:
            return own
        # gRPC loads only where a server is used.
        from ..wire.security import ChannelSecurity
        from .link import RemoteBack

        remote = RemoteBack(
            self._server.split(","),
            manifest_sha256=self.manifest_sha256,
            split=self.manifest.split,
            d_model=self.manifest.architecture.d_model,
            codec=codec,
            security=self._security or ChannelSecurity(),
            on_server_loss=self._on_server_loss,
        )
        return MovingBack(own, remote, self.manifest, hand_over) if whole else remote
