"""Decodes images in a process of its own, to learn which of them end the process that decodes them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from iwm_ray.data.decode import DecodeLimits, Undecodable, decode
from iwm_ray.errors import RunError

_LENGTH_BYTES = 8
_DONE = b"."


def deadly(images: Sequence[bytes | Undecodable], limits: DecodeLimits) -> dict[int, str]:
    """The place of each image that ended two tasters, and how; what is no bytes is passed over.

    Raises:
        RunError: tasters don't even start.
    """
    found: dict[int, str] = {}
    taster = None
    for i, data in enumerate(images):
        if isinstance(data, Undecodable):
            continue
        taster = taster or _start(limits)
        if _survives(taster, data):
            continue
        how, taster = _how(taster), _start(limits)  # once more: the first may have died of something else
        if not _survives(taster, data):
            found[i] = f"ends the process that decodes it ({how})"
            _how(taster)
            taster = None
    if taster:
        taster.communicate()
    return found


def _start(limits: DecodeLimits) -> "subprocess.Popen[bytes]":
    package = str(Path(__file__).parents[2])
    paths = [package, os.environ.get("PYTHONPATH", "")]
    taster = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "iwm_ray.data.taster", json.dumps(asdict(limits))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,  # the terminal's Ctrl-C is not an image's fault
    )
    assert taster.stdout
    if taster.stdout.read(1) != _DONE:
        raise RunError(
            f"a process that tries out images did not start ({_how(taster)}); is there memory for it?"
        )
    return taster


def _survives(taster: "subprocess.Popen[bytes]", data: bytes) -> bool:
    assert taster.stdin
    assert taster.stdout
    with suppress(BrokenPipeError):
        taster.stdin.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
        taster.stdin.flush()
        return taster.stdout.read(1) == _DONE
    return False


def _how(taster: "subprocess.Popen[bytes]") -> str:
    with suppress(BrokenPipeError):
        taster.communicate()
    code = taster.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _taste(incoming: BinaryIO, outgoing: BinaryIO, limits: DecodeLimits) -> None:
    outgoing.write(_DONE)
    outgoing.flush()
    while header := incoming.read(_LENGTH_BYTES):
        with suppress(Undecodable):
            decode(incoming.read(int.from_bytes(header, "big")), limits)
        outgoing.write(_DONE)
        outgoing.flush()


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    _taste(
        sys.stdin.buffer,
        sys.stdout.buffer,
        DecodeLimits(**settings | {"background": tuple(settings["background"])}),
    )
