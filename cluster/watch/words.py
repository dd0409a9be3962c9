"""The names of a request's mode and end in metrics, log and traces."""

import asyncio

import grpc

from cluster.faces.error_codes import code_of
from cluster.runs.record import Record
from twotower.core import Request

SCORE = "score"  # the mode's name for scores


def mode_of(record: Record) -> str:
    return str(record.request.params.mode) if isinstance(record.request, Request) else SCORE


def code_of_end(error: BaseException) -> grpc.StatusCode:
    """The code of the error that ended a run or a call. A face cancels the run of a client that has left."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED
    return code_of(error).grpc
