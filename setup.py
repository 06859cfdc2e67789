from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent

setup(
    name="ltrain",
    version="0.1.0",
    description="Long-context extension of pretrained language models on Megatron-core",
    long_description=(root / "README.md").read_text() if (root / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["ltrain", "ltrain.*"]),
        *(n.replace("kernels", "ltrain_kernels", 1) for n in find_packages(include=["kernels", "kernels.*"])),
    ],
    package_dir={"ltrain": "ltrain", "ltrain_kernels": "kernels"},
    package_data={"ltrain": ["py.typed"], "ltrain_kernels": ["**/*.cpp", "**/*.h", "**/*.json", "py.typed"]},
    install_requires=[
        "torch>=2.10",
        "megatron-core==0.16.1",
        "deepspeed>=0.18",
        "pulp>=3.0",
        "highspy>=1.10",
        "wandb>=0.20",
        "triton>=3.6; platform_system == 'Linux'",
        "nvidia-ml-py>=12",
        "numpy",
        "pydantic>=2.10",
        "psutil",
        "pyyaml",
        "rich",
        "transformers>=5.0",
        "tokenizers",
        "safetensors",
        "pyarrow",
        "matplotlib",
        "tensorboard",
        "ninja",
    ],
    extras_require={
        "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "types-PyYAML", "peft"],
        "eval": ["lm-eval[hf,ruler]"],
    },
    entry_points={"console_scripts": ["ltrain = ltrain.cli:main"]},
)
