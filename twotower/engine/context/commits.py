"""Reads for denoisers: their prompts and blocks come through ports, and a delta answers each."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from twotower.core import Likelihood
from twotower.decoding.steering import Matcher
from twotower.engine.context.compiling import Compiling
from twotower.engine.context.decoding import Decoding
from twotower.engine.context.likelihoods import Likelihoods
from twotower.engine.context.prompts import Prompts
from twotower.engine.context.sequences import ReadChunk, Sequences
from twotower.engine.context.verification import Verification
from twotower.engine.context.writing import NOT_FINITE
from twotower.engine.passes import Want
from twotower.engine.scheduler import Key, PrefillChunk
from twotower.engine.short_memory import ShortMemory
from twotower.errors import InvalidRequest, NumericalError, TwoTowerError
from twotower.exchange.protocol import (
    Command,
    Commit,
    Decided,
    Delta,
    Failed,
    Port,
    Prefill,
    Released,
    Reply,
    Verifying,
)
from twotower.model.tower import ContextTower


class Led(NamedTuple):
    """Key of a sequence that a denoiser leads: the denoiser's port, and the sequence's number on the link."""

    port: int
    number: int


class Commits:
    """Owns the ports. The loss of a port ends its sequences."""

    def __init__(
        self,
        tower: ContextTower,
        sequences: Sequences,
        prompts: Prompts,
        decoding: Decoding,
        compiling: Compiling,
        short: ShortMemory,
    ) -> None:
        self._sequences, self._prompts, self._decoding = sequences, prompts, decoding
        self._compiling, self._short = compiling, short
        self._verification = Verification(tower, sequences, self._tell, self.has_opened, self._fail, short)
        self._likelihoods = Likelihoods(tower, self._tell, self.has_opened)
        self.ports: dict[int, Port] = {}
        self._next_port = 0
        self._replies: dict[int, list[Reply]] = {}

    def connect(self, port: Port) -> None:
        self.ports[self._next_port] = port
        self._next_port += 1

    def receive(self) -> None:
        """Take the denoisers' commands."""
        for index, port in list(self.ports.items()):
            for command in port.receive():
                try:
                    self._take(Led(index, command.sequence), command)
                except TwoTowerError as error:
                    self._reply(index, Failed(command.sequence, error))
            if port.lost is not None:
                self._lose(index, port)

    def read(self, keys: Sequence[Key]) -> None:
        """Read the blocks of these sequences: final blocks in one forward, drafts in another."""
        drafts = [key for key in keys if key in self._verification]
        whole = [key for key in keys if key not in self._verification]
        short = self._short.tried(len(whole), partial(self._read_whole, whole)) if whole else None
        if short is not None:
            for key in whole:
                self.fail(key, short)
        if drafts:
            self._verification.read(drafts)

    def _read_whole(self, keys: Sequence[Key]) -> None:
        """Only sequences with likelihoods need hidden states."""
        starts = {key: self._sequences.length(key) for key in keys}
        rated = [key for key in keys if key in self._likelihoods]
        blocks = {key: (starts[key], tuple(self._sequences[key].to_read)) for key in rated}
        hidden_RLD = self._sequences.read(keys, Want.HIDDEN if rated else Want.STATES)
        rows = {key: hidden_RLD[row] for row, key in enumerate(keys) if key in blocks}
        likelihoods = self._likelihoods.of(blocks, rows) if rated else {}
        for key, start in starts.items():
            told = likelihoods.get(key, ())
            if told is None:
                self._fail(key, NumericalError(NOT_FINITE))
            else:
                self._tell(key, start, complete=True, likelihoods=told)

    def send(self) -> None:
        """Send all answers since the last call, a message a port."""
        for index, replies in self._replies.items():
            if index in self.ports:
                self.ports[index].send(replies)
        self._replies.clear()

    def waited_for(self, keys: Sequence[Key]) -> bool:
        """Whether the denoisers of these blocks can step nothing until the blocks are read."""
        ports = {_led(key).port for key in keys}
        led = [self._sequences[key] for key in self._sequences if isinstance(key, Led) and key.port in ports]
        # The context tower reads a mock-AR token while the denoiser steps on it.
        return all(self.ports[port].apart for port in ports) and all(len(each.to_read) > 1 for each in led)

    def has_opened(self, key: Key, found: Sequence[PrefillChunk], whole: bool) -> None:
        """The denoiser's mirror gets the found prefix as if it had just been read; the states come after the prompt."""
        slot, (port, number) = self._sequences[key].slot, _led(key)
        for chunk in found:
            self._reply(port, Delta(number, chunk.start, chunk.end, slot, complete=False, cached=True))
        if whole:
            self._reply(port, Delta(number, 0, 0, slot))

    def fail(self, key: Key, error: TwoTowerError) -> None:
        """The sequence's states are invalid. Nothing is read for it until its denoiser has released it."""
        self._sequences.pause(key)
        self._decoding.forget(key)
        self._fail(key, error)

    def wants_hidden(self, last: bool) -> bool:
        return False

    def has_read(self, chunks: Sequence[ReadChunk], hidden_RLD: Tensor) -> None:
        for read in chunks:
            self._tell(read.chunk.key, read.chunk.start, complete=read.last)

    def _take(self, key: Led, command: Command) -> None:
        if isinstance(command, Prefill):
            self._open(key, command)
        elif isinstance(command, Commit):
            self._commit(key, command)
        else:
            self._compiling.drop(key)
            if key in self._sequences:
                self._close(key)
            self._reply(key.port, Released(key.number))

    def _open(self, key: Led, command: Prefill) -> None:
        if key in self._sequences:
            raise InvalidRequest.of("sequence", f"got {key.number}, which is already open on this link")
        if command.verifying is not None:
            if not command.token_ids:
                raise InvalidRequest.of("token_ids", "got an empty prompt, wanted one behind which a token is decided")
            constraint = command.verifying.params.structured_outputs
            if constraint is None:
                self._open_verified(key, command, command.verifying)
            else:
                go = partial(self._open_verified, key, command, command.verifying)
                self._compiling.begin(key, constraint, go, partial(self._fail, key))
            return
        if command.rating is not None:
            self._sequences.open(key, self._likelihoods, command.token_ids, command.reserve, command.cache_salt)
            self._likelihoods.open(key, command.rating)
            return
        self._sequences.open(key, self, command.token_ids, command.reserve, command.cache_salt)

    def _open_verified(self, key: Led, command: Prefill, verifying: Verifying, matcher: Matcher | None = None) -> None:
        self._sequences.open(key, self._verification, command.token_ids, command.reserve, command.cache_salt)
        self._verification.open(key, verifying, command.rating, command.token_ids, matcher)

    def _commit(self, key: Led, command: Commit) -> None:
        if key not in self._sequences:
            raise InvalidRequest.of("sequence", f"got a commit to {key.number}, which is not open on this link")
        waiting = len(self._sequences[key].to_read)
        expected = self._sequences.length(key) + waiting
        if command.start != expected:
            raise InvalidRequest.of("start", f"got a commit at position {command.start}, wanted {expected}")
        if waiting:
            raise InvalidRequest.of("sequence", f"got a second commit to {key.number} before the first was read")
        if not command.alone:
            self._sequences.commit(key, command.token_ids)
        elif key in self._verification and len(command.token_ids) == 1:
            [token] = command.token_ids
            self._decoding.write(key, token, self._verification.alone(key, command.alone))
        else:
            raise InvalidRequest.of(
                "alone", "got a block to go on behind, wanted one token of a sequence with verdicts"
            )

    def _close(self, key: Key) -> None:
        self._prompts.finish(key)
        self._decoding.forget(key)
        self._sequences.close(key)
        self._verification.forget(key)
        self._likelihoods.forget(key)

    def _lose(self, index: int, port: Port) -> None:
        for key in self._sequences:
            if isinstance(key, Led) and key.port == index:
                self._close(key)
        self._compiling.drop_all(lambda key: isinstance(key, Led) and key.port == index)
        threading.Thread(target=port.close, name="closing a lost port", daemon=True).start()
        del self.ports[index]

    def _tell(
        self,
        key: Key,
        start: int,
        complete: bool,
        decided: Decided | None = None,
        likelihoods: Sequence[Likelihood] = (),
    ) -> None:
        slot, (port, number) = self._sequences[key].slot, _led(key)
        end = self._sequences.length(key)
        self._reply(port, Delta(number, start, end, slot, complete, decided, tuple(likelihoods)))

    def _fail(self, key: Key, error: TwoTowerError) -> None:
        if isinstance(error, NumericalError) and key in self._sequences:
            self._sequences.doubt(key)
        port, number = _led(key)
        self._reply(port, Failed(number, error))

    def _reply(self, index: int, reply: Reply) -> None:
        self._replies.setdefault(index, []).append(reply)


def _led(key: Key) -> Led:
    assert isinstance(key, Led), "only denoisers commit"
    return key
