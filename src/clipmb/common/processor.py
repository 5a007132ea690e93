"""CLIPProcessor: texts and images in, everything that a CLIP model takes out."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from PIL import Image

from clipmb.common.config import CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import CheckpointError, bad_input
from clipmb.common.features import BatchFeature
from clipmb.common.former import check_saving, drop_unneeded
from clipmb.common.hub import Source
from clipmb.common.image.pixels import is_array
from clipmb.common.image.processor import FILE, PROCESSOR_FILE, CLIPImageProcessor
from clipmb.common.json_files import json_text, read_json
from clipmb.common.saving import Transaction, read_whole, write_atomically
from clipmb.common.text.base import SPECIAL, Tokens
from clipmb.common.text.tokenizer import CLIPTokenizer, CLIPTokenizerFast
from clipmb.common.uploading import Uploadable, uploaded


def _arguments(function: Any) -> frozenset[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(name for name, value in inspect.signature(function).parameters.items() if value.kind in kinds)


_ARGUMENTS = {
    "text_kwargs": _arguments(CLIPTokenizerFast.__call__) - {"self", "text"},
    "images_kwargs": (_arguments(CLIPImageProcessor.preprocess) | {"device", "disable_grouping"}) - {"self", "images"},
    "common_kwargs": frozenset({"return_tensors"}),
}
_IMAGE_SETTINGS = _arguments(CLIPImageProcessor)
_OF_TEXT = _arguments(CLIPTokenizerFast) | _arguments(Tokens) | {"model_input_names", *SPECIAL}
_OF_TEXT |= _ARGUMENTS["text_kwargs"]
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
# Every file of a tokenizer and of an image processor that clipmb or transformers writes.
PROCESSOR_FILES = (*_TOKENIZER_FILES, "tokenizer_config.json", FILE, PROCESSOR_FILE)


class CLIPProcessor(Uploadable):
    """A `CLIPImageProcessor` and a `CLIPTokenizerFast` behind one call.

    Args:
        image_processor: Any object with its methods; CLIP's defaults when None.
        tokenizer: Any object with the methods of CLIP's tokenizers; `CLIPTokenizerFast` on the package's own merges
            when None.
        **kwargs: ``feature_extractor``, the deprecated name of ``image_processor``. Nothing else.

    Raises:
        TypeError: The two are swapped or of other kinds, or a keyword argument is unknown.
    """

    # As transformers 4 has them: lists of the parts, and what it looks for.
    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    optional_attributes: ClassVar[list[str]] = ["chat_template", "audio_tokenizer"]
    optional_call_args: ClassVar[list[str]] = []
    image_processor_class = ("CLIPImageProcessor", "CLIPImageProcessorFast")
    tokenizer_class = "AutoTokenizer"
    chat_template = None

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        if "feature_extractor" in kwargs:
            warnings.warn("feature_extractor= is deprecated. Pass image_processor=.", FutureWarning, stacklevel=2)
            former = kwargs.pop("feature_extractor")
            image_processor = former if image_processor is None else image_processor
        if kwargs:
            _unknown("CLIPProcessor", sorted(kwargs), "image_processor, tokenizer")
        self.image_processor = CLIPImageProcessor() if image_processor is None else image_processor
        self.tokenizer = CLIPTokenizerFast() if tokenizer is None else tokenizer
        for name, method in (("image_processor", "preprocess"), ("tokenizer", "convert_tokens_to_ids")):
            part = getattr(self, name)
            if isinstance(part, type) or not hasattr(part, method):
                raise bad_input(
                    f"{name} must be {'an image processor' if name == 'image_processor' else 'a tokenizer'}",
                    part if isinstance(part, type) else type(part),
                    "Pass CLIPProcessor(image_processor=..., tokenizer=...)",
                    TypeError,
                )

    @property
    def model_input_names(self) -> list[str]:
        """The fields of a full result, in its order."""
        return [*self.image_processor.model_input_names, *self.tokenizer.model_input_names]

    @property
    def feature_extractor(self) -> CLIPImageProcessor | Any:
        """The deprecated name of ``image_processor``."""
        warnings.warn("feature_extractor is deprecated. Use image_processor.", FutureWarning, stacklevel=2)
        return self.image_processor

    @property
    def feature_extractor_class(self) -> tuple[str, ...]:
        """The deprecated name of ``image_processor_class``."""
        warnings.warn("feature_extractor_class is deprecated. Use image_processor_class.", FutureWarning, stacklevel=2)
        return self.image_processor_class

    def __call__(self, text: Any = None, images: Any = None, **kwargs: Any) -> BatchFeature:
        """Tokenizes texts and preprocesses images.

        transformers changed the order of the positional arguments from (text, images) to (images, text) in 4.57. Both
        work here, because what is not text is recognised as images. Strings are paths of images only as ``images``.

        Args:
            text: As for `CLIPTokenizerFast`: a text or a list of texts.
            images: As for `CLIPImageProcessor`: an image, a list, a batch.
            **kwargs: Arguments of the two, flat (``padding=True``, ``do_resize=False``) or grouped in
                ``text_kwargs``, ``images_kwargs`` and ``common_kwargs``. ``return_tensors`` goes to both.

        Returns:
            ``pixel_values`` [images, channels, height, width] when there are images; ``input_ids`` and
            ``attention_mask`` [texts, tokens] when there are texts, which alone give a `BatchEncoding`.

        Raises:
            ValueError: There is neither text nor images, or an argument comes both flat and in a group.
            TypeError: A keyword argument is unknown, or both inputs are images.
        """
        if _is_image_like(text):
            if _is_image_like(images):
                raise bad_input(
                    "One input of CLIPProcessor must be text",
                    f"a {type(text).__name__} and a {type(images).__name__}",
                    "Pass all images in one list, as images=",
                    TypeError,
                    shown=True,
                )
            text, images = images, text
        if text is None and images is None:
            raise bad_input("CLIPProcessor needs text, images or both", "neither", "Pass text= or images=", shown=True)
        options = _sort(kwargs)
        options["text_kwargs"] = self._text_defaults() | options["text_kwargs"]
        encoding = None if text is None else self.tokenizer(text, **options["text_kwargs"])
        if images is None and isinstance(encoding, BatchFeature):
            return encoding
        data = {} if images is None else dict(self.image_processor(images, **options["images_kwargs"]))
        return BatchFeature(data | dict(encoding or {}))

    def _text_defaults(self) -> dict[str, Any]:
        """Returns the arguments of a call that the tokenizer was made or loaded with, as transformers 4 takes them."""
        kept: dict[str, Any] = getattr(self.tokenizer, "init_kwargs", {})
        return {name: getattr(self.tokenizer, name, kept[name]) for name in kept if name in _ARGUMENTS["text_kwargs"]}

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Turns rows of ids into texts; see the tokenizer's method."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Turns ids into text; see the tokenizer's method."""
        return self.tokenizer.decode(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | Source, **kwargs: Any) -> Self:
        """Loads both parts from a folder or a Hub id, saved by clipmb or by transformers 4 or 5.

        Args:
            pretrained_model_name_or_path: Where they are. No config.json is needed.
            **kwargs: The options of `Source`; settings of the image processor and of the tokenizer by name, which
                override those in the files; arguments of the tokenizer's call (``max_length``, ``padding``), which
                become defaults of this processor's; ``use_fast=False`` for a `CLIPTokenizer`; ``image_processor`` or
                ``tokenizer`` in the place of the one in the files.

        Raises:
            CheckpointError: A file is missing or unreadable.
            TypeError: Neither part has an argument of this name.
            ValueError: A setting is out of its range.
        """
        source = Source.of(pretrained_model_name_or_path, kwargs)
        tokenizer_class = CLIPTokenizer if kwargs.get("use_fast") is False else CLIPTokenizerFast
        drop_unneeded(kwargs)
        parts = {name: kwargs.pop(name, None) for name in cls.attributes}
        of_images = {name: kwargs.pop(name) for name in list(kwargs) if name in _IMAGE_SETTINGS}
        of_text = {name: kwargs.pop(name) for name in list(kwargs) if name in _OF_TEXT}
        if unknown := sorted(name for name, value in kwargs.items() if value is not None and value is not False):
            allowed = sorted({*_IMAGE_SETTINGS, *_OF_TEXT, *cls.attributes, "use_fast"})
            _unknown("CLIPProcessor.from_pretrained", unknown, ", ".join(allowed))

        def read() -> Self:
            images, tokenizer = parts["image_processor"], parts["tokenizer"]
            return cls(
                CLIPImageProcessor.from_pretrained(source, **of_images) if images is None else images,
                tokenizer_class.from_pretrained(source, **of_text) if tokenizer is None else tokenizer,
            )

        return read_whole(source.folder, read)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        legacy_serialization: bool = True,
        **options: Any,
    ) -> list[str]:
        """Writes the files of both parts into a folder, all or nothing.

        The image processor's settings go into preprocessor_config.json, where transformers 4 looks, and into
        processor_config.json, where transformers 5 looks first; each reads a folder that holds both.

        Args:
            save_directory: A folder; made when missing.
            push_to_hub: Also upload the files, with the options of `push_to_hub`; ``repo_id`` may be left out.
            legacy_serialization: Without effect; in transformers 4 it chose between the two layouts.
            **options: The arguments of transformers 4's `save_pretrained`.

        Returns:
            The paths of the two settings files; none with ``is_main_process=False``.
        """
        options["push_to_hub"] = push_to_hub
        if not check_saving(options):
            return []
        with uploaded(self, save_directory, options), Transaction(save_directory) as save:
            self._write(save)
        return [os.path.join(save_directory, name) for name in (FILE, PROCESSOR_FILE)]

    def _write(self, save: Transaction) -> None:
        """Adds the files to a save."""
        self.tokenizer.save_pretrained(save.path(""))
        save.remove(*_TOKENIZER_FILES)  # those that this tokenizer did not write
        whole = self.to_dict(legacy_serialization=False)
        save.write(FILE, json_text(whole["image_processor"] | {"processor_class": type(self).__name__}))
        save.write(PROCESSOR_FILE, json_text(whole))

    def to_dict(self, legacy_serialization: bool = True) -> dict[str, Any]:
        """Returns the content of processor_config.json.

        Args:
            legacy_serialization: Without the image processor's settings, as transformers 4 writes it.
        """
        named = {"processor_class": type(self).__name__}
        if legacy_serialization:
            return named
        settings = json.loads(self.image_processor.to_json_string())
        settings.pop("processor_class", None)
        return {"image_processor": settings, **named}

    def to_json_string(self, legacy_serialization: bool = True) -> str:
        """Returns `to_dict` as JSON."""
        return json_text(self.to_dict(legacy_serialization))

    def to_json_file(self, json_file_path: str | os.PathLike[str], legacy_serialization: bool = True) -> None:
        """Writes `to_json_string` to a file."""
        write_atomically(Path(json_file_path), self.to_json_string(legacy_serialization).encode())

    def __repr__(self) -> str:
        return f"{type(self).__name__}:\n- image_processor: {self.image_processor!r}\n- tokenizer: {self.tokenizer!r}"


def tokenizer_of(source: Source, config: CLIPTextConfig) -> CLIPTokenizerFast:
    """Loads the tokenizer of a checkpoint; a checkpoint without one gets CLIP's own.

    Raises:
        CheckpointError: There is none and the vocabulary is not CLIP's.
    """
    if has_tokenizer(source):
        return CLIPTokenizerFast.from_pretrained(source)
    if can_tokenize(source, config):
        return CLIPTokenizerFast()
    raise CheckpointError(
        f"{source} has no tokenizer, and its vocabulary of {config.vocab_size} tokens is not CLIP's own. "
        "Put vocab.json and merges.txt, or tokenizer.json, beside the weights."
    )


def image_processor_of(source: Source, config: CLIPVisionConfig) -> CLIPImageProcessor:
    """Loads the image processor of a checkpoint; one without gets CLIP's, in its size and with open_clip's colours.

    Raises:
        CheckpointError: A file is not readable.
    """
    if has_image_processor(source):
        return CLIPImageProcessor.from_pretrained(source)
    size = config.image_size
    colours = {}
    if (path := source.find("open_clip_config.json")) is not None:
        settings = read_json(path).get("preprocess_cfg")
        given = settings if isinstance(settings, dict) else {}
        colours = {f"image_{key}": given[key] for key in ("mean", "std") if given.get(key)}
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **colours)


def has_tokenizer(source: Source) -> bool:
    """Whether a checkpoint has the files of a tokenizer."""
    return any(source.find(name) for name in ("tokenizer.json", "vocab.json"))


def can_tokenize(source: Source, config: CLIPTextConfig) -> bool:
    """Whether `tokenizer_of` has a tokenizer for a checkpoint: its own, or CLIP's."""
    return has_tokenizer(source) or config.vocab_size == CLIPTextConfig().vocab_size


def has_image_processor(source: Source) -> bool:
    """Whether a checkpoint has the settings of an image processor."""
    return any(source.find(name) for name in (FILE, PROCESSOR_FILE))


def _is_image_like(value: Any) -> bool:
    """Whether this cannot be text: its first leaf is an image, an array, a path object or bytes."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, Image.Image | os.PathLike | bytes) or is_array(value)


def _sort(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sorts the keyword arguments of a call into those of the tokenizer and of the image processor."""
    flat = {name: value for name, value in given.items() if name not in _ARGUMENTS}
    for absent in ("videos", "audio"):  # the signature of transformers 4 has them
        if flat.get(absent, 0) is None:
            del flat[absent]
    unknown = sorted(set(flat).difference(*_ARGUMENTS.values()))
    if unknown:
        _unknown("CLIPProcessor.__call__", unknown, ", ".join(sorted(frozenset().union(*_ARGUMENTS.values()))))
    groups = {name: dict(given.get(name) or {}) for name in _ARGUMENTS}
    for name, group in groups.items():
        if unknown := sorted(set(group) - _ARGUMENTS[name]):
            _unknown(name, unknown, ", ".join(sorted(_ARGUMENTS[name])))
        if twice := sorted(set(group) & set(flat)):
            raise bad_input(f"An argument must be given once, either flat or in {name}", twice, "Remove one of the two")
    common = groups.pop("common_kwargs")
    return {
        name: common | {key: value for key, value in flat.items() if key in _ARGUMENTS[name]} | group
        for name, group in groups.items()
    }


def _unknown(where: str, names: list[str], allowed: str) -> NoReturn:
    raise TypeError(f"{where} has no arguments with these names. Received: {', '.join(names)}. Use some of: {allowed}.")
