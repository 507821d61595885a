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
    entry_points={
        "console_scripts": ["xbai=xbai.cli:app"],
        # vLLM calls it in each of its processes.
        "vllm.general_plugins": ["xbai=xbai.engine.fused_scores:register_models"],
    },
)
