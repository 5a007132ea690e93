"""Searches a folder of pictures by text.

    python examples/photo_search.py PICTURES OUT "a dog on a beach" [MODEL]

What is embedded stays in OUT: the next search starts at once. Without MODEL, the small model of the package serves.
"""

import sys

import clipmb


def main(pictures: str, out: str, text: str, model: str = str(clipmb.small_model())) -> None:
    done = clipmb.embed(pictures, out, model=model, resume=True, progress=True)
    print(f"{done['images']} images, {done['errors']} errors")
    for hit in clipmb.Index.open(out).search(text, k=5):
        print(f"{hit['score']:.3f} {hit['id']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
