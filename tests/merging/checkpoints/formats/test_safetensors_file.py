import pytest
import torch
from safetensors.torch import save_file

from merging.checkpoints.formats.safetensors_file import SafetensorsFile


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_every_dtype_and_shape_round_trips(tmp_path, dtype):
    values = {
        "matrix": torch.randn(3, 5).to(dtype),
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
    }
    save_file(values, tmp_path / "x.safetensors")
    file = SafetensorsFile.open(str(tmp_path / "x.safetensors"))
    for name, value in values.items():
        assert file.read(name).dtype == dtype
        assert torch.equal(file.read(name), value)
