"""The compiled kernel of image preprocessing, which is optional: without a compiler, Pillow does its work.

Everything else is in pyproject.toml.
"""

import os

from setuptools import Extension, setup

POSIX = os.name == "posix"

setup(
    ext_modules=[
        Extension(
            "clipmb.common.image._resize",
            ["src/clipmb/common/image/_resize.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            # Fused multiplications would round the weights in another way than Pillow's build does.
            extra_compile_args=["-O3", "-ffp-contract=off"] if POSIX else [],
            libraries=["m"] if POSIX else [],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
