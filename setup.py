"""Metadata and the folder mapping; pyproject.toml holds tool configuration only."""

from pathlib import Path

from setuptools import find_packages, setup

# The folders of the top level live inside one installed package: a wheel has one top-level name.
FOLDERS = {
    "ds_stability.launchers": "launchers",
    "ds_stability.ds_configs": "ds_configs",
    "ds_stability.eval": "eval",
    "ds_stability.eval.metrics": "eval/metrics",
}

setup(
    name="ds_stability",
    version="0.1.0",
    description="Train language models under DeepSpeed ZeRO-3 at a controlled, measured level of stabilization",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["ds_stability", "ds_stability.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "ds_stability.ds_configs": ["*.json", "models/*.json"],
        "ds_stability.launchers": ["*.md", "accelerate.yaml", "hostfile.example", "recipes/*.yaml", "slurm/*.sbatch", "sweeps/*.yaml"],
        "ds_stability.eval": ["*.yaml", "*.j2", "suites/*.yaml", "suites/tasks/*"],
    },
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",
        "hjson>=3.1",
        "transformers>=5.20,<6",
        "accelerate>=1.12,<2",
        "datasets>=4.0,<6",
        "tensorboard>=2.15",
        "pydantic>=2.7,<3",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pyyaml>=6.0",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "pandas>=2.0",
        "psutil>=5.9",
        "regex>=2025.10.22",
    ],
    extras_require={
        "peft": ["peft>=0.17"],
        "lm-eval": ["lm-eval>=0.4.13"],
        "slurm": ["submitit>=1.5"],
        "vllm": ["vllm>=0.10"],
        "trl": ["trl>=1.16"],
        "gguf": ["gguf>=0.17"],
        # Not among those of the tests, which skip without it: the wheel has 286 MB. CUDA builds of torch bring it along.
        "triton": ["triton>=3.2 ; platform_system == 'Linux'"],
        "test": [
            "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.8", "hypothesis>=6.100", "peft>=0.17", "trl>=1.16", "lm-eval>=0.4.13",
            "submitit>=1.5", "sacrebleu>=2.4", "playwright>=1.45",
        ],
    },
    entry_points={"console_scripts": ["ds-stability=ds_stability.cli:main"]},
)
