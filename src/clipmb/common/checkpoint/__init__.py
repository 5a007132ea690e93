"""Reading and writing checkpoints: any format to and from canonical names and numpy arrays."""

from clipmb.common.checkpoint.fitting import LoadingInfo, fit
from clipmb.common.checkpoint.safetensors import write_safetensors
from clipmb.common.checkpoint.tensors import OwnArrays

__all__ = ["LoadingInfo", "OwnArrays", "fit", "write_safetensors"]
