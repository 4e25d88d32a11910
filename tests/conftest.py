import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_slate():
    """Each test: float64, a fixed seed, an empty parameter store."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(default)


@pytest.fixture(
    params=[torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=["float32", "float64"]
)
def dtype(request):
    """The default type of a test in single precision, and if it is slow in double."""
    torch.set_default_dtype(request.param)
    return request.param
