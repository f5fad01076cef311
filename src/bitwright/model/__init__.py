"""The model that was given: its folder opened and checked, its tokenizer, the device, and which tensors are linears."""
