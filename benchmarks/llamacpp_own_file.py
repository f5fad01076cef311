"""llama.cpp's own file: its quantizer on the values of a file in F16.

    ENV/bin/python llamacpp_own_file.py F16.gguf TYPES.gguf OUTPUT.gguf
    ENV/bin/python llamacpp_own_file.py F16.gguf Q4_K OUTPUT.gguf

ENV has xllamacpp, whose library exports ggml_quantize_chunk (not llama_model_quantize, which calls it per tensor), and
gguf. Every tensor of F16.gguf is quantized to the type that TYPES.gguf gives it; metadata are those of TYPES.gguf. Or
the matrices of the blocks are quantized to the type that is named, and everything else stays as it is.
"""

import ctypes
import sys
from typing import Any

import numpy as np
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quant_shape_to_byte_shape

LIBRARY = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
LIBRARY.ggml_quantize_chunk.restype = ctypes.c_size_t
LIBRARY.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3]
LIBRARY.ggml_quantize_chunk.argtypes += [ctypes.c_void_p]


def quantized(values: Any, kind: GGMLQuantizationType) -> Any:
    """The values of a tensor [rows, columns] in a type: rows of bytes."""
    given = np.ascontiguousarray(values, dtype=np.float32)
    rows, columns = given.shape
    blocks = np.empty(quant_shape_to_byte_shape(given.shape, kind), np.uint8)
    count = LIBRARY.ggml_quantize_chunk(kind, given.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    assert count == blocks.nbytes
    return blocks


def type_of(tensor: Any, types: str) -> GGMLQuantizationType:
    """A tensor's own type if ``types`` is a file, else the named type if the tensor is a matrix of a block."""
    matrix = tensor.name.startswith("blk.") and len(tensor.shape) > 1
    named = matrix and not types.endswith(".gguf")
    return GGMLQuantizationType[types] if named else GGMLQuantizationType(tensor.tensor_type)


def main(source: str, types: str, output: str) -> None:
    """Write the file."""
    given = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    model = GGUFReader(types if types.endswith(".gguf") else source)
    writer = GGUFWriter(output, model.fields["general.architecture"].contents())
    for name, field in model.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inside = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inside)
    for tensor in model.tensors:
        tensor_values, kind = given[tensor.name], type_of(tensor, types)
        data = tensor_values.data if tensor_values.tensor_type == kind else quantized(tensor_values.data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
