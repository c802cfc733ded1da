"""The detokenizer process: tokens in, text out, stop strings reported back to the scheduler."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import zmq

from sglang.srt.garbage import freeze_what_is_here
from sglang.srt.ipc import IpcNames, Receiver, Sender, announce_ready
from sglang.srt.managers.detokenizer import BatchDecode, IncrementalDetokenizer
from sglang.srt.messages import (
    FreezeGarbage,
    Shutdown,
    StopMatched,
    ToDetokenizer,
    TokenBatch,
)

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


class DetokenizerManager:
    """Owns the sockets; what is decoded is the business of IncrementalDetokenizer."""

    def __init__(self, context: zmq.Context[Any], ipc: IpcNames, decode: BatchDecode | None):
        self._detokenizer = IncrementalDetokenizer(decode)
        self._inbox: Receiver[TokenBatch | FreezeGarbage | Shutdown] = Receiver(
            context, ipc.detokenizer, ToDetokenizer
        )
        self._to_tokenizer = Sender(context, ipc.tokenizer)
        self._to_scheduler = Sender(context, ipc.scheduler)

    def run(self) -> None:
        """Serves until Shutdown arrives."""
        try:
            while True:
                for message in self._inbox.recv_all():
                    if isinstance(message, Shutdown):
                        return
                    if isinstance(message, FreezeGarbage):
                        freeze_what_is_here()
                    else:
                        self._handle(message)
        finally:
            for end in (self._inbox, self._to_tokenizer, self._to_scheduler):
                end.close()

    def _handle(self, batch: TokenBatch) -> None:
        decoded = self._detokenizer.process(batch)
        for rid in decoded.stopped:  # first, so that the engine stops as soon as it can
            self._to_scheduler.send(StopMatched(rid=rid))
        if decoded.batch.rids:
            self._to_tokenizer.send(decoded.batch)


def decode_with(tokenizer: Any) -> BatchDecode:
    """The tokenizer's batch decoding, without clean-up that would rewrite text already sent."""
    from transformers import PreTrainedTokenizerFast

    if getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode:
        # All that its own batch_decode adds is a Python call a row, four times the decoding's cost.
        backend = tokenizer.backend_tokenizer
        return lambda rows, skip_special, spaces: backend.decode_batch(
            rows, skip_special_tokens=skip_special
        )

    def decode(rows: list[list[int]], skip_special: bool, spaces: bool) -> list[str]:
        texts: list[str] = tokenizer.batch_decode(
            rows,
            skip_special_tokens=skip_special,
            spaces_between_special_tokens=spaces,
            clean_up_tokenization_spaces=False,
        )
        return texts

    return decode


def run_detokenizer(server_args: ServerArgs, ipc: IpcNames, ready: Connection) -> None:
    """Process main. Returns after Shutdown; whatever it raises ends the server."""
    decode = None
    if not server_args.skip_tokenizer_init:
        from sglang.srt.served_model import load_served_tokenizer

        decode = decode_with(load_served_tokenizer(server_args))
    with zmq.Context() as context:
        manager = DetokenizerManager(context, ipc, decode)
        freeze_what_is_here()
        announce_ready(ready, {})
        manager.run()
