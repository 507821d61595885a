"""The `xbai` package: the SPRM method, serving and evaluation. The trainer is installed from `verl/`."""

from setuptools import find_packages, setup

setup(
    name="xbai",
    version="0.1.0",
    description="Reflective generative models: one language model that reasons and scores its own reasoning",
    license="Apache-2.0",
    python_requires=">=3.11",
    # An explicit root makes editable installs a plain path entry, which `verl/` beside it needs to be importable.
    package_dir={"": "."},
    packages=find_packages(include=["xbai", "xbai.*"]),
    # vLLM is not among them: which one fits depends on the machine, and the transformers engine does without.
    install_requires=[
        "datasets>=4,<6",
        "fastapi>=0.115,<0.137",
        "httpx>=0.27,<0.29",
        "math-verify>=0.8,<0.10",
        "matplotlib>=3.9,<4",
        "numpy>=2,<3",
        "pandas>=2.2,<4",
        "prometheus-client>=0.21,<0.27",
        "pyarrow>=17",
        "rich>=13,<16",
        "torch>=2.11,<2.14",
        "transformers>=5.16,<5.20",
        "typer>=0.15,<0.30",
        "uvicorn>=0.30,<0.55",
    ],
    entry_points={
        "console_scripts": ["xbai=xbai.cli:app"],
        # vLLM calls it in each of its processes.
        "vllm.general_plugins": ["xbai=xbai.engine.fused_scores:register_models"],
    },
)
