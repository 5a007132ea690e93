"""Learning a vocabulary from texts, with the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from clipmb.common.text.vocabulary import SUFFIX, Vocabulary, tokenizer_json


def learn(
    texts: Iterable[str] | Iterable[list[str]],
    vocab_size: int,
    special: Sequence[str],
    *,
    length: int | None = None,
    **options: Any,
) -> Vocabulary:
    """Learns tokens and merges, from texts cleaned and cut into words as CLIPTokenizerFast does.

    Args:
        texts: Texts, or batches of them.
        vocab_size: Number of tokens, the special ones and the 256 bytes included.
        special: Special tokens, which get the first ids.
        length: Number of texts, for the progress bar of the library.
        **options: Other arguments of ``tokenizers.trainers.BpeTrainer``, such as ``min_frequency``.

    Returns:
        The vocabulary.

    Raises:
        ImportError: The tokenizers library is not installed.
    """
    try:
        from tokenizers import Tokenizer, pre_tokenizers, trainers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"Learning a vocabulary needs tokenizers, which cannot be imported ({error}). "
            "Install it: pip install tokenizers"
        ) from error
    nothing = json.loads(tokenizer_json(Vocabulary({}, {}), [], ("", None), ("", None), None))
    library = Tokenizer.from_str(json.dumps({**nothing, "post_processor": None}))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    given = {
        "initial_alphabet": alphabet,
        "end_of_word_suffix": SUFFIX,
        "continuing_subword_prefix": "",
        "show_progress": False,
        **options,
    }
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), **given)
    library.train_from_iterator(texts, trainer=trainer, length=length)
    model = json.loads(library.to_str())["model"]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    return Vocabulary(model["vocab"], {merge: rank for rank, merge in enumerate(merges)})
