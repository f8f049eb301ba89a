"""Metadata and extras. Tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "memorizing" / "__init__.py").read_text()).group(1)

# Everything installs under `memorizing`, so that no generic `data`, `launch`, `gin` or `benchmarks` lands in anyone's site-packages.
FOLDERS = {
    "memorizing": "memorizing",
    "memorizing.data": "data",
    "memorizing.launch": "launch",
    "memorizing.benchmarks": "benchmarks",
}
GIN_FILES = [str(path.relative_to(ROOT / "gin")) for path in (ROOT / "gin").rglob("*.gin")]

# seqio is not there for every Python and platform: editdistance has no wheel from 3.13 on, TensorFlow Text none from 3.14
# on, nor for Windows. Nothing but the seqio Tasks needs it.
SEQIO = "; python_version < '3.13' and (sys_platform == 'linux' or sys_platform == 'darwin' and platform_machine == 'arm64')"

setup(
    name="memorizing",
    version=VERSION,
    description="Language models that remember: training in JAX with external memories, TPU first",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "memorizing",
        *(f"memorizing.{room}" for room in find_packages(str(ROOT / "memorizing"))),
        "memorizing.benchmarks",
        "memorizing.benchmarks.estimated",
        "memorizing.benchmarks.reading",
        "memorizing.benchmarks.trained",
        "memorizing.data",
        *(f"memorizing.data.{room}" for room in find_packages(str(ROOT / "data"))),
        "memorizing.gin",
        "memorizing.launch",
    ],
    package_dir=FOLDERS | {"memorizing.gin": "gin"},
    package_data={
        "memorizing.evaluation.inspection": ["*.css", "*.html", "*.js"],
        "memorizing.evaluation.run_page": ["*.html"],
        "memorizing.gin": GIN_FILES,
        "memorizing.launch": ["Dockerfile", "sky.yaml"],
    },
    install_requires=[
        "absl-py",
        "array_record",
        "etils[epath]",
        "fsspec",
        "flax>=0.12",
        "gin-config>=0.5",
        # TFDS reads its checksums through it and does not ask for it.
        "importlib_resources",
        "jax>=0.10",
        "jaxtyping",
        "matplotlib",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pyyaml",
        "rich",
        f"seqio{SEQIO}",
        # 0.2.3 needs a protobuf that Apache Beam does not accept yet.
        "sentencepiece>=0.2,<0.2.3",
        "tensorboardX",
        f"tensorflow-datasets{SEQIO}",
    ],
    extras_require={
        # What `memorizing bench search` compares with.
        "bench": ["faiss-cpu", "torch"],
        "dev": ["pre-commit", "pyright[nodejs]"],
        "docs": ["zensical>=0.0.73"],
        # Kinds of documents that the standard library does not read.
        "documents": ["backports.zstd; python_version < '3.14'", "pyarrow", "pypdf"],
        # What pretrained models are held against.
        "parity": ["torch", "transformers"],
        # Workdirs, caches and archives in gs://, without TensorFlow.
        "gcs": ["gcsfs"],
        "prep": ["apache-beam>=2.77"],
        # Tasks of the LM Evaluation Harness.
        "lm-eval": ["lm-eval>=0.4.13"],
        # Models and vocabularies of others.
        "pretrained": ["gguf", "tokenizers"],
        "serve": ["starlette>=0.40", "uvicorn>=0.30"],
        # httpx asks what is served; the two of Kubernetes check what `launch gke` emits.
        "test": [
            "backports.zstd; python_version < '3.14'",
            "beartype",
            "gcsfs",
            "httpx",
            "hypothesis",
            "kubeflow-trainer-api",
            "kubernetes-validate",
            "lm-eval>=0.4.13",
            "pyarrow",
            "pypdf",
            "pytest",
            "pytest-xdist",
            "ruff",
            "starlette>=0.40",
            "tokenizers",
            "uvicorn>=0.30",
        ],
        "tpu": ["jax[tpu]"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["memorizing = memorizing.main:main"]},
)
