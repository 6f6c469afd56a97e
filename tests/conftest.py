"""Fixtures of all tests."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter

FOREIGN_WARNINGS = [
    # The interpreter computes with numpy, which warns of NaN and inf where a GPU does not.
    "ignore::RuntimeWarning:triton.runtime.interpreter",
    # Inductor's import, in torch 2.13.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    # Inductor's advice to give up float32 for TF32, once for each process on a GPU.
    "ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning",
    # torch 2.11: CUDA-graph trees warm up by an empty capture, Inductor's autotuning asks storages.
    "ignore:The CUDA Graph is empty:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
    # torch 2.11: a CUDA build's profiler, about cycles that no test uses.
    "ignore:Warning. Profiler clears events at the end of each cycle:UserWarning",
    # Triton 3.6's interpreter (with the numpy below 2.4 that it needs).
    "ignore:Conversion of an array with ndim > 0 to a scalar is deprecated:DeprecationWarning",
    # Triton 3.9 announces a default of 3.10 at the first compile for a GPU.
    "ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    for warning in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", warning)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cpu":
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return DEVICE
