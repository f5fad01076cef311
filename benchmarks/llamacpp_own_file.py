"""llama.cpp's own file with the tensor types of another: its quantizer on the values of a file in F16.

    ENV/bin/python llamacpp_own_file.py F16.gguf TYPES.gguf OUTPUT.gguf

ENV has xllamacpp, whose library exports ggml_quantize_chunk (not llama_model_quantize, which calls it per tensor), and
gguf. Every tensor of F16.gguf is quantized to the type that TYPES.gguf gives it; metadata are those of TYPES.gguf.
"""

import ctypes
import sys
from typing import Any

import numpy as np
import xllamacpp
from gguf import GGUFReader, GGUFValueType, GGUFWriter

LIBRARY = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
LIBRARY.ggml_quantize_chunk.restype = ctypes.c_size_t
LIBRARY.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3]
LIBRARY.ggml_quantize_chunk.argtypes += [ctypes.c_void_p]


def quantized(values: Any, like: Any) -> Any:
    """The values of a tensor [rows, columns] in another's type, its bytes shaped as that one's."""
    given = np.ascontiguousarray(values, dtype=np.float32)
    made = np.empty(like.data.shape, np.uint8)
    rows, columns = given.shape
    count = LIBRARY.ggml_quantize_chunk(like.tensor_type, given.ctypes.data, made.ctypes.data, 0, rows, columns, None)
    assert count == made.nbytes
    return made


def main(source: str, types: str, output: str) -> None:
    """Writes the file."""
    given, model = {tensor.name: tensor for tensor in GGUFReader(source).tensors}, GGUFReader(types)
    writer = GGUFWriter(output, model.fields["general.architecture"].contents())
    for name, field in model.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inside = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inside)
    for tensor in model.tensors:
        found = given[tensor.name]
        same = found.tensor_type == tensor.tensor_type
        data = found.data if same else quantized(found.data, tensor)
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
