"""Every random draw of a run, as a pure function of what it is for.

A draw is keyed by (run seed, epoch, sample, purpose), never by process state: it is the same in every data worker, after
every restart and in a replay. The hash itself is the source of the numbers (blake2b, RFC 7693), so the values depend on
no library's random generator and stay the same for ever; tests hold golden values.
"""

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

_UNIFORMS_PER_DIGEST = 8  # 64 bytes are eight numbers of 64 bits
_KEY = struct.Struct("<qqqq")


def uniforms(
    seed: int, epoch: int, samples: NDArray[np.int64], purpose: str, count: int
) -> NDArray[np.float64]:
    """Draws `count` independent numbers in [0, 1) for each sample.

    Args:
        seed: the run's seed.
        epoch: which pass over the data.
        samples: `[b]` sample numbers.
        purpose: what the draw is for ("crop", "source", "mask", ...), at most 16 ASCII characters.
        count: how many numbers a sample needs.

    Returns:
        `[b, count]` float64 in [0, 1), 53 random bits each.
    """
    person = purpose.encode("ascii")
    num_blocks = -(-count // _UNIFORMS_PER_DIGEST)
    digests = b"".join(
        hashlib.blake2b(_KEY.pack(seed, epoch, int(sample), block), person=person).digest()
        for sample in samples
        for block in range(num_blocks)
    )
    words = np.frombuffer(digests, dtype="<u8").reshape(len(samples), num_blocks * _UNIFORMS_PER_DIGEST)
    return (words[:, :count] >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(seed: int, epoch: int, purpose: str, count: int) -> NDArray[np.uint64]:
    """Draws `count` 64-bit integers that belong to no sample (round keys, subsets)."""
    person = purpose.encode("ascii")
    digests = b"".join(
        hashlib.blake2b(_KEY.pack(seed, epoch, -1, block), person=person).digest()
        for block in range(-(-count // _UNIFORMS_PER_DIGEST))
    )
    return np.frombuffer(digests, dtype="<u8")[:count].astype(np.uint64)
