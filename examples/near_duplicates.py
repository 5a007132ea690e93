"""Finds pictures that are nearly the same.

    python examples/near_duplicates.py PICTURES OUT [COSINE [MODEL]]

Prints each group on a line, the largest file first, which is the one to keep. Nothing is removed.
"""

import os
import sys

import clipmb


def main(pictures: str, out: str, cosine: str = "0.97", model: str = str(clipmb.small_model())) -> None:
    clipmb.embed(pictures, out, model=model, resume=True, progress=True)
    index = clipmb.Index.open(out)
    paths = index.table().column("path").to_pylist()
    for rows in index.duplicates(float(cosine)):
        print(*sorted((paths[row] for row in rows), key=os.path.getsize, reverse=True), sep="\t")


if __name__ == "__main__":
    main(*sys.argv[1:])
