"""Makes the embedded corpus: a corpus folder with FLAC recordings becomes one with Ogg Opus, small enough to ship.

    python -m data_pipelines.embed_corpus SOURCE data_pipelines/corpus

Running it twice on one machine gives the same bytes: dialogues keep their order, and the random serial number that an
Ogg stream carries is replaced by one made from the file's name.
"""

import argparse
import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from chroma_jax.audio import load as audio
from chroma_jax.utils.errors import InputError

SAMPLE_RATE = 24_000  # what the Codec reads; Opus keeps it in the header
COMPRESSION = 0.88  # libsndfile's scale from 0 (256 kbit/s) to 1 (6 kbit/s): about 34 kbit/s for these voices

REVERSED_BITS = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))


def ogg_crc(page: bytes) -> int:
    """Checksum of an Ogg page (RFC 3533: polynomial 0x04c11db7, not reflected, no inversions), by way of zlib's reflected
    one on reversed bits."""
    reflected = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def with_serial(ogg: bytes, serial: int) -> bytes:
    """The same Ogg stream under another serial number. Page header: RFC 3533, section 6."""
    pages, at = [], 0
    while at < len(ogg):
        segments = ogg[at + 26]
        size = 27 + segments + sum(ogg[at + 27 : at + 27 + segments])
        page = bytearray(ogg[at : at + size])
        struct.pack_into("<I", page, 14, serial)
        struct.pack_into("<I", page, 22, 0)
        struct.pack_into("<I", page, 22, ogg_crc(bytes(page)))
        pages.append(bytes(page))
        at += size
    return b"".join(pages)


def opus(wave: np.ndarray, name: str) -> bytes:
    """float32 [S] at 24 kHz → an Ogg Opus file."""
    file = io.BytesIO()
    soundfile.write(file, wave, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION)
    return with_serial(file.getvalue(), zlib.crc32(name.encode()))


def convert(source: Path, out: Path, name: str, fields: tuple[str, ...]) -> int:
    """Converts one manifest and the recordings that its ``fields`` name. Returns the bytes written."""
    entries = [json.loads(line) for line in (source / name).read_text(encoding="utf-8").splitlines()]
    renamed = [{k: Path(v).with_suffix(".opus").as_posix() if k in fields else v for k, v in e.items()} for e in entries]
    pairs = [(old[f], new[f]) for old, new in zip(entries, renamed, strict=True) for f in fields]

    def write(pair: tuple[str, str]) -> int:
        old, new = pair
        (out / new).parent.mkdir(parents=True, exist_ok=True)
        return (out / new).write_bytes(opus(audio.load(source / old, SAMPLE_RATE), new))

    with ThreadPoolExecutor() as pool:
        size = sum(tqdm(pool.map(write, pairs), name, total=len(pairs), unit="file"))
    text = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in renamed)
    return size + (out / name).write_bytes(text.encode())


def embed(source: Path, out: Path) -> int:
    """Converts a corpus folder. Returns the bytes written. Raises InputError when ``out`` already holds a corpus."""
    if (out / "dialogues.jsonl").exists():
        raise InputError(f"{out}: already holds a corpus; remove its .jsonl files and recordings first")
    return convert(source, out, "references.jsonl", ("audio",)) + convert(
        source, out, "dialogues.jsonl", ("question_audio", "answer_audio")
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with dialogues.jsonl, references.jsonl and FLAC recordings")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    print(f"{embed(args.source, args.out):,} bytes")


if __name__ == "__main__":
    main()
