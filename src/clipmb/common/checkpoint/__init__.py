"""Reading and writing checkpoints: any format to and from canonical names and numpy arrays."""

from clipmb.common.checkpoint.fitting import LoadingInfo, fit
from clipmb.common.checkpoint.safetensors import OwnArrays, read_safetensors, write_safetensors

__all__ = ["LoadingInfo", "OwnArrays", "fit", "read_safetensors", "write_safetensors"]
