"""Converts a CLIP checkpoint to another format: `clipmb convert` for those who have the sources only."""

from __future__ import annotations

import argparse
import sys

from clipmb import ClipmbError, convert
from clipmb.common.checkpoint.formats import FORMATS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("src", help="folder, file of weights, or Hub id, in any format")
    parser.add_argument("dst", help="folder to write into")
    parser.add_argument("--to", default="safetensors", choices=FORMATS)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="the source's own if not given")
    parser.add_argument("--head", help="write only this part of a larger model, for example CLIPTextModel")
    parser.add_argument("--config", help="config.json of the source, or its folder, if the source has none")
    parser.add_argument("--shard-size", default="5GB", help="split larger results")
    parser.add_argument("--subfolder", default="", help="folder inside SRC")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--variant", help="read model.VARIANT.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that DST holds")
    parser.add_argument("--dry-run", action="store_true", help="print the mapping and write nothing")
    parser.add_argument("--verify", action="store_true", help="also run source and result through every backend")
    given = vars(parser.parse_args())
    given["max_shard_size"] = given.pop("shard_size")
    check = None
    if given.pop("verify"):
        from clipmb.verification import verify_conversion as check
    try:
        done = convert(**given, progress=True, check=check)
    except (ClipmbError, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for entry in done.mapping if done.record == {} else ():
        print(*entry, sep="\t")
    for key, text in done.decisions.items():
        print(f"{key}: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
