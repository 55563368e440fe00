from ziplora.headers import Header, Limits, TensorInfo, read_header, read_header_file
from ziplora.module_names import is_target

__all__ = ["Header", "Limits", "TensorInfo", "is_target", "read_header", "read_header_file"]
