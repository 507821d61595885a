"""The `verl` package: the Ray + FSDP2 + vLLM trainer. It needs `xbai` beside it: `pip install -r requirements.txt`."""

from setuptools import find_packages, setup

setup(
    name="verl",
    version="0.3.0",
    description="Joint GRPO and SPRM training of reflective generative models",
    license="Apache-2.0",
    python_requires=">=3.11",
    # An explicit root makes the editable install a plain path entry: `import verl` then works from the
    # repository root, where the folder `verl/` would otherwise be taken for a namespace package.
    package_dir={"": "."},
    packages=find_packages(include=["verl", "verl.*"]),
    package_data={"verl": ["trainer/config/*.yaml"]},
    install_requires=[
        "datasets>=4,<6",
        "fsspec",
        "hydra-core>=1.3,<1.4",
        "numpy>=2,<3",
        "psutil>=6,<8",
        "pyarrow>=17",
        "ray[default]>=2.60,<2.61",
        "rich>=13,<16",
        "tensorboard>=2.15,<3",
        "tensordict>=0.10,<0.16",
        "torch>=2.11,<2.14",
        "torchdata>=0.11,<0.12",
        "transformers>=5.16,<5.20",
        "wandb>=0.20,<0.32",
    ],
    extras_require={
        # For optimisers with states in 8 bits
        "adam8bit": ["torchao>=0.18,<0.19"],
        # For kernels on GPUs
        "liger": ["liger-kernel>=0.8,<0.9"],
    },
)
